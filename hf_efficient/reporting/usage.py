"""How a receiver loads and calls a result: the same few lines in card and page, run by a test.

print(loading_snippet(report, "me/bert-fast"))
"""

from ..data.tasks import TASKS, Task
from ..io.text import python_literal
from .schema import Report

# Of an encoder without a head; as `models.pooling.pool` does it.
_POOLED = {
    "mean": "(states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)",
    "cls": "states[torch.arange(len(states)), mask.argmax(1)]  # the first token",
    "last": "states[torch.arange(len(states)), mask.cumsum(1).argmax(1)]  # the last token",
    "weighted_mean": "(states * (n := (mask * mask.cumsum(1))[..., None])).sum(1) / n.sum(1)  # 1, 2, 3, ... times",
}
_SENTENCES = (
    "from sentence_transformers import SentenceTransformer",
    "",
    "model = SentenceTransformer({})",
    'vectors = model.encode(["A text.", "Another text."])',
    "print(model.similarity(vectors[:1], vectors[1:]))",
)
_PAIRS = (
    "from sentence_transformers import CrossEncoder",
    "",
    "model = CrossEncoder({})",
    'print(model.rank("A question?", ["A text that answers it.", "Another text."]))',
)


def loading_snippet(report: Report, repo_id: str) -> str:
    """Python that loads the model from `repo_id` and, where inputs can be written down, calls it once.

    `image` stands for an image of the reader's own.
    """
    auto, processor, place = report.auto_class, report.processor_class, python_literal(repo_id)
    lines = ["import hf_efficient"] if report.loads_with == "plugin" else []
    if report.library_name == "sentence-transformers":
        usage = _SENTENCES if auto == "AutoModel" else _PAIRS
        return "\n".join([*lines, *(line.format(place) for line in usage)])
    lines += ["import torch"] if auto == "AutoModel" and processor else []
    lines += [f"from transformers import {auto}{f', {processor}' if processor else ''}", ""]
    lines += [f"model = {auto}.from_pretrained({place})"]
    if processor:
        lines += [f"processor = {processor}.from_pretrained({place})", "", *_call(report)]
    return "\n".join(lines)


def export_snippet(report: Report, repo_id: str) -> str:
    """Python that loads the first of the exports; an empty text if there are none."""
    if not report.exports:
        return ""
    place, folder = python_literal(repo_id), python_literal(report.exports[0].folder)
    return f"model = ExportedModel.from_pretrained({place}, subfolder={folder})"


def _call(report: Report) -> list[str]:
    if report.auto_class == "AutoModel":
        return _vectors(report)
    entries = [task for task in TASKS.values() if task.auto_class == report.auto_class]
    measured = report.student.quality and TASKS.get(report.student.quality.task)  # of those that share an Auto class
    task = measured if measured in entries else entries[0] if entries else None
    sample, call = (Task.sample, Task.call) if task is None else (task.sample, task.call)
    given = "image" if report.processor_class == "AutoImageProcessor" else sample
    return [f'inputs = processor({given}, return_tensors="pt")', *call]


def _vectors(report: Report) -> list[str]:
    """How texts become vectors, pooled as they were when they were distilled and measured; not at all by a way
    that we do not know."""
    pooling = next((stage.settings["pooling"] for stage in report.stages[::-1] if "pooling" in stage.settings), "mean")
    known = isinstance(pooling, str) and pooling in _POOLED
    lines = [
        'inputs = processor(["A text.", "Another text."], padding=True, truncation=True, return_tensors="pt")',
        "with torch.no_grad():",
        "    states = model(**inputs).last_hidden_state",
    ]
    if not known:
        return [*lines, "print(states.shape)"]
    return [
        *lines,
        'mask = inputs["attention_mask"]',
        f"vectors = {_POOLED[pooling]}",
        "print(torch.cosine_similarity(vectors[0], vectors[1], dim=0))",
    ]
