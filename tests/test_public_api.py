"""The public surface: what it is, that it is cheap to import, and that it registers whatever is imported first."""

import json
import subprocess
import sys

import pytest

import hf_efficient
from hf_efficient import AttentionConfig, convert_attention

from .families import make_model
from .processes import run_fresh, save_with_expectation

PUBLIC = [
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


def test_all_is_exact():
    assert hf_efficient.__all__ == PUBLIC
    assert dir(hf_efficient) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_can_be_imported_and_says_what_it_is(name):
    value = getattr(hf_efficient, name)
    assert value.__doc__
    if name != "__version__":
        assert value.__module__.split(".")[0] == "hf_efficient"
        assert getattr(sys.modules[value.__module__], name) is value


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'convert_atention'"):
        hf_efficient.convert_atention  # noqa: B018


def test_there_is_one_version_number():
    from importlib.metadata import version

    assert hf_efficient.__version__ == version("hf-efficient")


@pytest.mark.processes
def test_importing_the_package_imports_nothing_heavy():
    code = "import json, sys, hf_efficient; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "hf_efficient" in loaded
    heavy = {
        "torch",
        "transformers",
        "numpy",
        "datasets",
        "peft",
        "accelerate",
        "yaml",
        "huggingface_hub",
        "safetensors",
    }
    assert not loaded & heavy


FIRST = ("AutoConfig", "AutoModel", "Trainer", "BertConfig", "AutoProcessor", "pipeline")
EVERY = [(name, when) for name in FIRST for when in ("before", "after")]
SOME = [("AutoModel", "before"), ("Trainer", "after")]


@pytest.mark.processes
@pytest.mark.parametrize("orders", [SOME, pytest.param(EVERY, marks=pytest.mark.thorough)], ids=["some", "every"])
def test_efficient_checkpoints_load_whatever_is_imported_first(orders, tmp_path):
    model = convert_attention(make_model("bert"), AttentionConfig(kind="local", window=2))
    save_with_expectation(model, "bert", tmp_path / "checkpoints")
    scenarios = [f"order:{name}:{when}" for name, when in orders]
    answers = run_fresh(tmp_path / "checkpoints", *scenarios, home=tmp_path / "home")
    assert answers.keys() == set(scenarios)
    for scenario, answer in answers.items():
        assert answer.get("bert", answer).get("equal") is True, (scenario, answer)
        assert answer["bert"]["class"] == "EfficientBertForTokenClassification"
