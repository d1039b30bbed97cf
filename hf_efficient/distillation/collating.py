"""Batches are checked where they are made, on the CPU: what a model cannot read is told before the model is run.

    trainer.data_collator = CheckedCollator(trainer.data_collator, student, teacher)

On a GPU an id beyond the vocabulary or a label beyond the classes ends the process with an assertion of a kernel; on a
CPU with an IndexError out of an embedding.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import DataError, shown
from ..models.inputs import check_range
from ..training.batch import IGNORED, Head, base_of, head_of

IDS = ("input_ids", "decoder_input_ids")


class Collator:
    """A data collator around another one; what else is asked of it, such as its tokenizer, is that one's."""

    def __init__(self, collate: Callable[[list], Any]):
        self.collate = collate

    def __getattr__(self, name: str) -> Any:
        if name == "collate" or name.startswith("__"):  # while a copy of it is being made in a worker
            raise AttributeError(name)
        return getattr(self.collate, name)


class CheckedCollator(Collator):
    """As `collate`; the batches are such that all `models` can read them.

    Raises:
        DataError: rows of different lengths that nothing pads; ids that a model has no embedding for; labels that
            are no classes, or no tokens.
    """

    def __init__(self, collate: Callable[[list], Any], *models: nn.Module):
        super().__init__(collate)
        bases = [base_of(model) for model in models]
        ids = ("input_ids", "input_features")  # of speech the decoder reads ids
        reading = [base for base in bases if base.main_input_name in ids or base.config.is_encoder_decoder]
        tables = [base.get_input_embeddings() for base in reading]
        sizes = [table.num_embeddings for table in tables if isinstance(table, nn.Embedding)]
        self.ids = min(sizes, default=None)
        self.labels = _label_count(head_of(models[0]), bases[0])

    def __call__(self, rows: list) -> Any:
        try:
            batch = self.collate(rows)
        except (ValueError, RuntimeError) as error:
            lengths = {name: {len(row[name]) for row in rows} for name in IDS if all(name in row for row in rows)}
            ragged = [name for name, sizes in lengths.items() if len(sizes) > 1]
            if not ragged:
                raise
            raise DataError(
                f"The rows of a batch have {ragged[0]} of {min(lengths[ragged[0]])} to {max(lengths[ragged[0]])} "
                f"tokens, and data_collator does not make one batch of them: {shown(error)}. Give one that pads: "
                "DataCollatorWithPadding(tokenizer), DataCollatorForSeq2Seq(tokenizer)."
            ) from error
        for name in IDS:
            if self.ids is not None and torch.is_tensor(batch.get(name)):
                check_range(batch[name], self.ids, f"{name} of a batch", "the embeddings of the model")
        labels = batch.get("labels")
        if self.labels is not None and torch.is_tensor(labels) and not labels.is_floating_point():
            count, what = self.labels
            meaning = f"{what}, and {IGNORED} where there is none"
            check_range(labels[labels != IGNORED], count, "labels of a batch", meaning)
        return batch


def _label_count(head: Head, model: Any) -> tuple[int, str] | None:
    """How many labels there are, and what they are; None where any number is one."""
    if head.kind in ("causal_lm", "tokens") and not head.num_labels:
        output = model.get_output_embeddings()
        return None if output is None else (output.weight.shape[0], "the tokens of its output")
    if head.kind == "ctc":
        return model.config.vocab_size, "the tokens of its output"
    if head.num_labels > 1 and head.kind in ("examples", "tokens"):
        return head.num_labels, f"its {head.num_labels} classes"
    return None
