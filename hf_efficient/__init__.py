"""Efficient attention, pruning and distillation for Hugging Face Transformers.

    from hf_efficient import AttentionConfig, convert_attention
    model = convert_attention(model, AttentionConfig(kind="local", window=128, global_tokens=1))

Importing the package makes `AutoModel.from_pretrained` load efficient checkpoints. Nothing heavy is imported before it
is used: each public name is fetched from its module on first access.
"""

from importlib import import_module

from ._auto import register_when_needed
from ._moved import keep_old_names
from .errors import (
    CheckpointError,
    ConfigError,
    DataError,
    HfEfficientError,
    RequirementError,
    TrainingError,
    UnsupportedModelError,
)
from .version import __version__

_LAZY = {
    "AttentionConfig": "attention.config",
    "AttentionVariant": "attention.variant",
    "register_attention": "attention.registry",
    "convert_attention": "conversion.convert",
    "efficient_config": "conversion.convert",
    "extend_positions": "conversion.positions",
    "transfer_attention": "distillation.transfer",
    "PruningConfig": "pruning.config",
    "prune": "pruning.prune",
    "plan": "pruning.prune",
    "PruningPlan": "pruning.plan",
    "register_importance": "pruning.score.units",
    "self_calibration": "pruning.score.own_words",
    "merge_kv_heads": "pruning.fit.kv_heads",
    "prune_vocabulary": "pruning.cut.vocabulary",
    "free": "pruning.exact",
    "PruningCallback": "pruning.callback",
    "DistillationArguments": "distillation.arguments",
    "DistillationTrainer": "distillation.trainer",
    "TeacherCache": "distillation.cache.cache",
    "build_student": "distillation.student",
    "teacher_texts": "distillation.generation",
    "cache_teacher": "distillation.cache.write",
    "Recipe": "recipes.recipe",
    "compress": "pipeline.compress",
    "measure": "measurement.measure",
    "predict": "measurement.prediction",
    "quantize": "runtimes.quantization",
    "export": "runtimes.export",
    "push": "pipeline.hub",
    "sweep": "pipeline.sweep",
    "Report": "reporting.schema",
    "load_report": "reporting.schema",
}

__all__ = [
    "AttentionConfig",
    "AttentionVariant",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DistillationArguments",
    "DistillationTrainer",
    "HfEfficientError",
    "PruningCallback",
    "PruningConfig",
    "PruningPlan",
    "Recipe",
    "Report",
    "RequirementError",
    "TeacherCache",
    "TrainingError",
    "UnsupportedModelError",
    "__version__",
    "build_student",
    "cache_teacher",
    "compress",
    "convert_attention",
    "efficient_config",
    "export",
    "extend_positions",
    "free",
    "load_report",
    "measure",
    "merge_kv_heads",
    "plan",
    "predict",
    "prune",
    "prune_vocabulary",
    "push",
    "quantize",
    "register_attention",
    "register_importance",
    "self_calibration",
    "sweep",
    "teacher_texts",
    "transfer_attention",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_needed()
keep_old_names()
