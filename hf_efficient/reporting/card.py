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
from .tables import describe_machine, describe_workload, markdown_exports, markdown_structure, markdown_table

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
# As `distillation.losses.pool` does it.
_POOLED = {
    "mean": "(states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)",
    "cls": "states[torch.arange(len(states)), mask.argmax(1)]  # the first token",
    "last": "states[torch.arange(len(states)), mask.cumsum(1).argmax(1)]  # the last token",
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
        base_model_relation="finetune" if base_id else None,
        license=report.licence,
        library_name="transformers",
        pipeline_tag=None if quality is None else _HUB_TASKS.get(quality.task, quality.task),
        tags=["hf_efficient", *dict.fromkeys(stage.name for stage in report.stages if stage.name != "teacher")],
        datasets=[report.dataset.name] if report.dataset and _hub_id(report.dataset.name) else None,
        metrics=None if quality is None else [score.name for score in quality.scores],
        model_name=title,
        eval_results=_eval_results(report) or None,
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
        processor=report.processor_class,
        vectors=_vectors(report) if quality is not None and quality.task == EMBEDDINGS else None,
        stages=[_stage(stage) for stage in report.stages],
        sizes=_listed(report.dataset.sizes) if report.dataset else "",
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


def _eval_results(report: Report) -> list["EvalResult"]:
    from huggingface_hub import EvalResult

    quality, dataset = report.student.quality, report.dataset
    if quality is None or dataset is None:
        return []
    return [
        EvalResult(
            task_type=_HUB_TASKS.get(quality.task, quality.task),
            dataset_type=dataset.name,
            dataset_name=dataset.name,
            metric_type=score.name,
            metric_name=score.name.replace("_", " "),
            metric_value=score.value,
        )
        for score in quality.scores
        if math.isfinite(score.value)
    ]


def _vectors(report: Report) -> str:
    """How texts become vectors, pooled as they were when they were distilled and measured."""
    pooling = next((stage.settings["pooling"] for stage in report.stages[::-1] if "pooling" in stage.settings), "mean")
    return f"""inputs = processor(["A text.", "Another text."], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    states = model(**inputs).last_hidden_state
mask = inputs["attention_mask"]
vectors = {_POOLED[pooling]}
print(torch.cosine_similarity(vectors[0], vectors[1], dim=0))"""


def _stage(stage: StageRecord) -> dict[str, str]:
    # For machines and for the page: they stay in the report.
    digests = {name for name in stage.facts if name.endswith("sha256") or name == "curve"}
    settings = _listed(stage.settings)
    facts = _listed({name: value for name, value in stage.facts.items() if name not in digests})
    return {"name": stage.name, "time": f"{stage.seconds:.1f} s", "settings": settings, "facts": facts}


def _listed(values: dict[str, Any]) -> str:
    """`ratio 0.55, metric macs`."""
    return ", ".join(f"{name} {value}" for name, value in values.items()).replace("\n", " ")
