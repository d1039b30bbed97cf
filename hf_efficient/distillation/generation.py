"""Texts that a model writes, as batches to learn from.

    inputs = write(student, batch, max_new_tokens=128, sampling=1.0)       # on-policy: the student's own outputs
    rows = teacher_texts(teacher, rows, data_collator=collator, ...)       # sequence-level: the teacher's outputs

**On-policy** (GKD, Agarwal et al. 2023): the teacher says token by token what it thinks of what the student wrote, so
the student learns where its own mistakes lead. **Sequence-level** (Kim & Rush 2016): the teacher's best output takes
the place of the labels.

The prompt of a causal model is what comes before the first label that counts; without one, the first half of the text.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, default_data_collator

from ..errors import ConfigError, DataError
from ..models.modes import eval_mode
from ..models.registry import text_config
from ..training.batch import IGNORED, Batch, Head, base_of, forward_names, head_of
from .collating import CheckedCollator

if TYPE_CHECKING:
    from datasets import Dataset

GENERATING = "models that write: AutoModelForCausalLM and AutoModelForSeq2SeqLM"


def writes(model: Any) -> bool:
    """Whether a model can continue or answer a text, token by token. Whisper's `generate` has ways of its own."""
    reads = "input_ids" in forward_names(model)
    return reads and head_of(model).kind in ("causal_lm", "tokens") and base_of(model).can_generate()


@torch.no_grad()
def write(
    model: PreTrainedModel, batch: Batch, *, max_new_tokens: int, sampling: float | None, num_beams: int = 1
) -> dict[str, Any]:
    """The inputs of a batch with what `model` writes in place of the labels.

    Parameters:
        sampling: the temperature at which tokens are drawn; `None` takes the likeliest (`num_beams` of them).

    Raises:
        DataError: a batch without token ids.
    """
    base: Any = base_of(model)
    if "input_ids" not in batch.inputs and batch.head.kind == "causal_lm":
        raise DataError("Generation needs input_ids; this batch has none.")
    own = base.generation_config
    stops = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    paddings = (own.pad_token_id, text_config(base.config).pad_token_id, *stops)
    padding = next((token for token in paddings if token is not None), 0)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampling is not None,
        num_beams=num_beams,
        eos_token_id=own.eos_token_id,
        pad_token_id=padding,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
        **({"temperature": sampling, "top_k": 0, "top_p": 1.0} if sampling is not None else {}),
    )
    with eval_mode(model):
        if batch.head.kind == "causal_lm":
            prompts = _prompts(batch)
            ids, mask = _padded(prompts, padding, left=True)
            written = base.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :]
            return _continued(prompts, [_until(row, stops) for row in written], padding)
        names = forward_names(base)
        inputs = {n: v for n, v in batch.model_inputs(names, base).items() if not n.startswith("decoder_")}
        inputs.pop("use_cache", None)
        written = base.generate(**inputs, generation_config=config)[:, 1:]  # without the start of the decoder
        labels, counts = _padded([_until(row, stops) for row in written], padding)
        others = {n: v for n, v in batch.inputs.items() if n not in ("labels", "decoder_input_ids")}
        return others | {"labels": labels.masked_fill(counts == 0, IGNORED)}


def teacher_texts(
    teacher: PreTrainedModel,
    dataset: "Dataset",
    *,
    data_collator: Callable[[list], Any] = default_data_collator,
    max_new_tokens: int = 128,
    num_beams: int = 4,
    batch_size: int = 8,
) -> "Dataset":
    """Sequence-level distillation: the same examples with the teacher's beam-search outputs as labels.

    Give the result to `DistillationTrainer` (or to any `Trainer`) as `train_dataset`; `losses={"ce": 1}` is the method
    of the paper.

    Parameters:
        teacher: a loaded model that writes, on the device where it is to run.
        dataset: tokenised examples; labels are not needed.

    Raises:
        ConfigError: a model that does not write, or an option out of range.
        DataError: rows of different lengths that `data_collator` does not pad, or ids that the teacher does not know.
    """
    import datasets

    if not writes(teacher):
        raise ConfigError(f"teacher_texts is for {GENERATING}; got {type(base_of(teacher)).__name__}.")
    for name, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams), ("batch_size", batch_size)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} must be 1 or more, got {value!r}.")
    head, names = head_of(teacher), forward_names(teacher)
    rows = dataset.remove_columns([name for name in dataset.column_names if name not in names])
    collate = CheckedCollator(data_collator, teacher)
    texts: list[dict[str, list]] = []
    for start in range(0, len(rows), batch_size):
        inputs = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        placed = {k: v.to(teacher.device) if torch.is_tensor(v) else v for k, v in dict(inputs).items()}
        written = write(
            teacher, Batch(placed, head), max_new_tokens=max_new_tokens, sampling=None, num_beams=num_beams
        )
        texts += _unpadded(written, head)
    return datasets.Dataset.from_list(texts)


def _prompts(batch: Batch) -> list[Tensor]:
    ids, mask = batch.inputs["input_ids"], batch.token_masks()["encoder"]
    labels = batch.labels if batch.labels is not None else ids
    prompts = []
    for row, where, wanted in zip(ids, mask, labels, strict=True):
        real = row[where]
        counts = (wanted[where] != IGNORED).nonzero()
        size = int(counts[0]) if len(counts) else len(real)
        prompts.append(real[: size or max(1, len(real) // 2)])
    return prompts


def _continued(prompts: list[Tensor], written: list[Tensor], padding: int) -> dict[str, Tensor]:
    whole = [torch.cat(pair) for pair in zip(prompts, written, strict=True)]
    ids, mask = _padded(whole, padding)
    labels = ids.masked_fill(mask == 0, IGNORED)
    for row, prompt in zip(labels, prompts, strict=True):
        row[: len(prompt)] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _until(row: Tensor, stops: list[int | None]) -> Tensor:
    """Up to the first token that stops, and with it."""
    ends = torch.isin(row, torch.tensor([stop for stop in stops if stop is not None], device=row.device)).nonzero()
    return row[: int(ends[0]) + 1] if len(ends) else row


def _padded(rows: list[Tensor], padding: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = rows[0].new_full((len(rows), longest), padding)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[index, where], mask[index, where] = row, 1
    return ids, mask


def _unpadded(inputs: dict[str, Any], head: Head) -> list[dict[str, list]]:
    """The rows of a batch, for a `Dataset`."""
    tensors = {name: value.cpu() for name, value in inputs.items() if torch.is_tensor(value)}
    mask = tensors.get("attention_mask")
    rows = []
    for index in range(len(tensors["labels"])):
        row = {}
        for name, value in tensors.items():
            own = value[index]
            if name == "labels" and len(head.stacks) == 2:
                own = own[own != IGNORED]
            elif mask is not None and value.shape == mask.shape:
                own = own[mask[index].bool()]
            row[name] = own.tolist()
        rows.append(row)
    return rows
