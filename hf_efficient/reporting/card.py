"""The model card of a compressed checkpoint: every number in it comes from its report.

    card = model_card(report, repo_id="me/bert-fast")
    save_card(report, "out", repo_id="me/bert-fast")       # out/README.md, with the plots that lie in out/

Nothing here talks to the network.
"""

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plots import ACCURACY_LATENCY, STRUCTURE
from .schema import Report, StageRecord
from .tables import (
    describe_energy,
    describe_footprint,
    describe_machine,
    describe_workload,
    listed,
    markdown_exports,
    markdown_structure,
    markdown_table,
)
from .usage import loading_snippet

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

TEMPLATE = Path(__file__).resolve().parent.parent / "templates" / "model_card.md"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE = re.compile(r".*\.(csv|tsv|json|jsonl|parquet|arrow|txt)")
EMBEDDINGS = "sentence-embeddings"
# The Hub's own names of the tasks that it calls differently.
_HUB_TASKS = {
    "causal-lm": "text-generation",
    "seq2seq": "text2text-generation",
    "masked-lm": "fill-mask",
    EMBEDDINGS: "sentence-similarity",
}
_IMAGES = {ACCURACY_LATENCY: "Quality and latency", STRUCTURE: "What is left of each layer"}


def model_card(report: Report, repo_id: str = "path/to/this/model", images: tuple[str, ...] = ()) -> "ModelCard":
    """The card as a `huggingface_hub.ModelCard`.

    Parameters:
        repo_id: where the reader will load it from; its last part is the title.
        images: file names beside the card, of those that `save_plots` writes.
    """
    from huggingface_hub import ModelCard, ModelCardData

    title = repo_id.split("/")[-1] if repo_id != "path/to/this/model" else f"Compressed {report.base_model}"
    quality = report.student.quality
    base_id = _hub_id(report.base_model)
    data = ModelCardData(
        base_model=base_id,
        base_model_relation=_relation(report) if base_id else None,
        license=report.licence,
        library_name="transformers",
        pipeline_tag=None if quality is None else _HUB_TASKS.get(quality.task, quality.task),
        tags=["hf_efficient", *dict.fromkeys(stage.name for stage in report.stages if stage.name != "teacher")],
        datasets=[report.dataset.name] if report.dataset and _hub_id(report.dataset.name) else None,
        metrics=None if quality is None else [score.name for score in quality.scores],
        model_name=title,
        eval_results=_eval_results(report) or None,
        co2_eq_emissions=_emissions(report),
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        report=report,
        repo_id=repo_id,
        title=title,
        base_id=base_id,
        quality=quality,
        comparison=markdown_table(report),
        structure=markdown_structure(report),
        exports=markdown_exports(report),
        quantized=any(stage.name == "quantize" for stage in report.stages),
        workload=describe_workload(report.student),
        machine=describe_machine(report),
        energy=describe_energy(report.student),
        footprint=describe_footprint(report),
        snippet=loading_snippet(report, repo_id),
        recipe=recipe_text(report),
        fence=_fence(recipe_text(report)),
        stages=[_stage(stage) for stage in report.stages],
        sizes=listed(report.dataset.sizes) if report.dataset else "",
        images=[(name, _IMAGES[name]) for name in images],
    )


def save_card(report: Report, folder: str | Path, repo_id: str = "path/to/this/model") -> Path:
    """Write `README.md` into a checkpoint folder, showing the plots that lie there; complete or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = str(model_card(report, repo_id, plots_in(folder)))
    part = folder / f".README.md.{os.getpid()}.part"
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, folder / "README.md")
    finally:
        part.unlink(missing_ok=True)
    return folder / "README.md"


def plots_in(folder: Path) -> tuple[str, ...]:
    """The pictures in a folder that a card can show."""
    return tuple(name for name in _IMAGES if (folder / name).is_file())


def _hub_id(name: str) -> str | None:
    """The name if it can be one on the Hub: not a sentence, a file or `bundled:...`."""
    return name if _HUB_ID.fullmatch(name) and not _FILE.fullmatch(name) else None


def recipe_text(report: Report) -> str:
    """The recipe as YAML that `hf-efficient compress` reads; an empty text if the report names none."""
    import yaml

    if not report.recipe:
        return ""
    return yaml.safe_dump(_said(report.recipe), sort_keys=False, allow_unicode=True).rstrip()


def _said(value: Any) -> Any:
    """Without what is not set."""
    if isinstance(value, dict):
        return {name: _said(each) for name, each in value.items() if each is not None}
    return [_said(each) for each in value] if isinstance(value, list) else value


def _fence(text: str) -> str:
    """Longer than any run of backticks inside."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))


def _relation(report: Report) -> str:
    """The Hub's word for what the model is to its base; `quantized` only if nothing else was done."""
    done = {
        stage.name
        for stage in report.stages
        if stage.name != "export" and (stage.name, stage.settings) != ("teacher", {})
    }
    return "quantized" if done == {"quantize"} else "finetune"


def _emissions(report: Report) -> dict[str, Any] | None:
    """Of training, in grams, as the Hub's metadata has it; None unless tracked, in a country that is known."""
    used = report.footprint
    if used is None or used.co2_grams is None:
        return None
    return {
        "emissions": used.co2_grams,
        "source": f"{used.tool}, {used.source}",
        "training_type": "fine-tuning" if _hub_id(report.base_model) else "pre-training",
        "geographical_location": used.country,
        "hardware_used": describe_machine(report),
    }


def _eval_results(report: Report) -> list["EvalResult"]:
    from huggingface_hub import EvalResult

    quality, dataset = report.student.quality, report.dataset
    if quality is None or dataset is None:
        return []
    return [
        EvalResult(
            task_type=_HUB_TASKS.get(quality.task, quality.task),
            dataset_type=dataset.name.split(":")[-1],
            dataset_name=dataset.name,
            dataset_split="test" if "test" in dataset.sizes else None,
            metric_type=score.name,
            metric_name=score.name.replace("_", " "),
            metric_value=score.value,
        )
        for score in quality.scores
        if math.isfinite(score.value)
    ]


def _stage(stage: StageRecord) -> dict[str, str]:
    # For machines and for the page: they stay in the report.
    hidden = {name for name in stage.facts if name.endswith("sha256") or name in ("curve", "energy")}
    settings = listed(stage.settings)
    facts = listed({name: value for name, value in stage.facts.items() if name not in hidden})
    return {"name": stage.name, "time": f"{stage.seconds:.1f} s", "settings": settings, "facts": facts}
