"""The model card of a compressed checkpoint: every number in it comes from its report.

    card = model_card(report, repo_id="me/bert-fast")
    save_card(report, "out", repo_id="me/bert-fast")       # out/README.md, with the plots that lie in out/

Whatever the template shows is escaped, but for Markdown that was made here (`Markup`): no field of a report begins a
link, an image, a heading or HTML. Nothing here talks to the network.
"""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.tasks import TASKS
from ..io.disk import write_atomic
from ..io.text import Markup, for_line, for_markdown, for_terminal, longest_run, markdown_code
from .exported import describe_exports, describe_serving
from .ladder_tables import advice, describe_ladder, markdown_ladder
from .language_tables import describe_generation, language_rows, samples
from .numbers import format_seconds
from .plots import ACCURACY_LATENCY, LADDER, STRUCTURE
from .schema import Report, StageRecord
from .tables import (
    HEADER,
    describe_energy,
    describe_footprint,
    describe_machine,
    describe_workload,
    listed,
    markdown,
    markdown_exports,
    markdown_serving,
    markdown_structure,
    markdown_table,
)
from .usage import export_snippet, loading_snippet

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

TEMPLATE = Path(__file__).resolve().parent / "templates" / "model_card.md"
_HUB_ID = re.compile(r"(?!.*(\.\.|--|\.git$))[A-Za-z0-9_][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)
_WORD = re.compile(r"[\w.+-]{1,80}", re.ASCII)  # such as a licence on the Hub
_FILE = re.compile(r".*\.(csv|tsv|json|jsonl|parquet|arrow|txt)")
_IMAGES = {
    ACCURACY_LATENCY: "Quality and latency",
    STRUCTURE: "What is left of each layer",
    LADDER: "Beside what is cheap to try",
}


def model_card(report: Report, repo_id: str = "path/to/this/model", images: tuple[str, ...] = ()) -> "ModelCard":
    """The card as a `huggingface_hub.ModelCard`.

    Parameters:
        repo_id: where the reader will load it from; its last part is the title.
        images: file names beside the card, of those that `save_plots` writes.
    """
    from huggingface_hub import ModelCard, ModelCardData
    from jinja2 import Environment

    title = repo_id.split("/")[-1] if repo_id != "path/to/this/model" else f"Compressed {report.base_model}"
    quality = report.student.quality
    base_id = _hub_id(report.base_model)
    names = dict.fromkeys(stage.name for stage in report.stages if stage.name != "teacher")
    data = ModelCardData(
        base_model=base_id,
        base_model_relation=_relation(report) if base_id else None,
        license=report.licence if report.licence and _WORD.fullmatch(report.licence) else None,
        library_name=report.library_name,
        pipeline_tag=None if quality is None else _hub_task(quality.task),
        tags=["hf_efficient", *map(for_line, names)],
        datasets=[report.dataset.name] if report.dataset and _hub_id(report.dataset.name) else None,
        metrics=None if quality is None else [for_line(score.name) for score in quality.scores],
        model_name=for_line(title),
        eval_results=_eval_results(report) or None,
        co2_eq_emissions=_emissions(report),
    )
    recipe = recipe_text(report)
    template = Environment(finalize=for_markdown).from_string(TEMPLATE.read_text(encoding="utf-8"))
    content = template.render(
        card_data=Markup(data.to_yaml()),
        report=report,
        title=title,
        base_id=base_id,
        quality=quality,
        comparison=markdown_table(report),
        language=markdown(HEADER, rows) if (rows := language_rows(report)) else "",
        generation=describe_generation(report),
        samples=samples(report),
        **_ladder(report),
        structure=markdown_structure(report),
        exports=markdown_exports(report),
        export_words=describe_exports(report),
        serving=markdown_serving(report),
        serving_words=describe_serving(report),
        quantized=any(stage.name == "quantize" for stage in report.stages),
        workload=describe_workload(report.student),
        machine=describe_machine(report),
        energy=describe_energy(report.student),
        footprint=describe_footprint(report),
        snippet=Markup(loading_snippet(report, repo_id)),
        export_snippet=Markup(export_snippet(report, repo_id)),
        export_needs=markdown_code(next(iter(report.exports[0].runtime.split()), "")) if report.exports else "",
        recipe=Markup(recipe),
        fence=Markup("`" * max(3, 1 + longest_run("`", recipe))),  # longer than any run of backticks inside
        stages=[_stage(stage) for stage in report.stages],
        sizes=Markup(listed(report.dataset.sizes, for_markdown)) if report.dataset else "",
        images=[(name, _IMAGES[name]) for name in images],
    )
    return ModelCard(content)


def _ladder(report: Report) -> dict[str, str]:
    """Fields of the template, empty texts without one."""
    return {"ladder": markdown_ladder(report), "advice": advice(report), "ladder_note": describe_ladder(report)}


def save_card(report: Report, folder: str | Path, repo_id: str = "path/to/this/model") -> Path:
    """Write `README.md` into a checkpoint folder, showing the plots that lie there; complete or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return write_atomic(folder / "README.md", str(model_card(report, repo_id, plots_in(folder))))


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
    texts = (
        yaml.safe_dump(_said(report.recipe), sort_keys=False, allow_unicode=each).rstrip() for each in (True, False)
    )
    return next((text for text in texts if for_terminal(text) == text), "")  # no control character stands in it


def _said(value: Any) -> Any:
    """Without what is not set."""
    if isinstance(value, dict):
        return {name: _said(each) for name, each in value.items() if each is not None}
    return [_said(each) for each in value] if isinstance(value, list) else value


def _hub_task(task: str) -> str:
    """The Hub's name of a task, which may be one that we do not know."""
    return for_line((TASKS[task].hub_name if task in TASKS else None) or task)


def _relation(report: Report) -> str:
    """The Hub's word for what the model is to its base; `quantized` only if nothing else was done."""
    steps = {
        stage.name
        for stage in report.stages
        if stage.name != "export" and (stage.name, stage.settings) != ("teacher", {})
    }
    return "quantized" if steps == {"quantize"} else "finetune"


def _emissions(report: Report) -> dict[str, Any] | None:
    """Of training, in grams, as the Hub's metadata has it; None unless tracked, in a country that is known."""
    footprint = report.footprint
    if footprint is None or footprint.co2_grams is None:
        return None
    return {
        "emissions": footprint.co2_grams,
        "source": for_line(f"{footprint.tool}, {footprint.source}"),
        "training_type": "fine-tuning" if _hub_id(report.base_model) else "pre-training",
        "geographical_location": None if footprint.country is None else for_line(str(footprint.country)),
        "hardware_used": for_line(describe_machine(report)),
    }


def _eval_results(report: Report) -> list["EvalResult"]:
    from huggingface_hub import EvalResult

    quality, dataset = report.student.quality, report.dataset
    if quality is None or dataset is None:
        return []
    return [
        EvalResult(
            task_type=_hub_task(quality.task),
            dataset_type=for_line(dataset.name.split(":")[-1]),
            dataset_name=for_line(dataset.name),
            dataset_split="test" if "test" in dataset.sizes else None,
            metric_type=for_line(score.name),
            metric_name=for_line(score.name.replace("_", " ")),
            metric_value=score.value,
        )
        for score in quality.scores
        if math.isfinite(score.value)
    ]


def _stage(stage: StageRecord) -> dict[str, str]:
    # For machines and for the page: they stay in the report.
    hidden = {name for name in stage.facts if name.endswith("sha256") or name in ("curve", "energy")}
    settings = Markup(listed(stage.settings, for_markdown))
    facts = Markup(listed({name: value for name, value in stage.facts.items() if name not in hidden}, for_markdown))
    return {"name": stage.name, "time": format_seconds(stage.seconds), "settings": settings, "facts": facts}
