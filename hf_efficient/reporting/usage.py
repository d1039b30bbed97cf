"""How a receiver loads and calls a result: the same few lines in card and page, run by a test.

print(loading_snippet(report, "me/bert-fast"))
"""

from ..io.text import python_literal
from .schema import Report

_GENERATES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
_CALLS = {
    "AutoModelForSequenceClassification": "model.config.id2label[model(**inputs).logits.argmax().item()]",
    "AutoModelForImageClassification": "model.config.id2label[model(**inputs).logits.argmax().item()]",
    "AutoModelForTokenClassification": "model(**inputs).logits.argmax(dim=-1)",
    "AutoModelForQuestionAnswering": "model(**inputs).start_logits.argmax().item()",
}
# Of an encoder without a head; as `models.pooling.pool` does it.
_POOLED = {
    "mean": "(states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)",
    "cls": "states[torch.arange(len(states)), mask.argmax(1)]  # the first token",
    "last": "states[torch.arange(len(states)), mask.cumsum(1).argmax(1)]  # the last token",
}


def loading_snippet(report: Report, repo_id: str) -> str:
    """Python that loads the model from `repo_id` and, where inputs can be written down, calls it once.

    `image` stands for an image of the reader's own.
    """
    auto, processor, place = report.auto_class, report.processor_class, python_literal(repo_id)
    lines = ["import hf_efficient"] if report.loads_with == "plugin" else []
    lines += ["import torch"] if auto == "AutoModel" and processor else []
    lines += [f"from transformers import {auto}{f', {processor}' if processor else ''}", ""]
    lines += [f"model = {auto}.from_pretrained({place})"]
    if processor:
        lines += [f"processor = {processor}.from_pretrained({place})", "", *_call(report)]
    return "\n".join(lines)


def _call(report: Report) -> list[str]:
    auto, given = report.auto_class, '"A text of your own."'
    if auto == "AutoModel":
        return _vectors(report)
    if report.processor_class == "AutoImageProcessor":
        given = "image"
    elif auto == "AutoModelForQuestionAnswering":
        given = '"A question?", "A text that answers it."'
    inputs = f'inputs = processor({given}, return_tensors="pt")'
    if auto in _GENERATES:
        return [inputs, "tokens = model.generate(**inputs)", "print(processor.batch_decode(tokens))"]
    return [inputs, f"print({_CALLS.get(auto, 'model(**inputs).logits')})"]


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
