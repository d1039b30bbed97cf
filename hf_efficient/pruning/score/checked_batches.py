"""Calibration batches that a model cannot read are told before any long work: which batch, what it holds, what may be.

check_batches(Anatomy.of(model), batches)
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import DataError, shown
from ...models.anatomy import Anatomy
from ...models.inputs import check_range
from ...models.registry import text_config, token_limit
from ...models.token_masks import IGNORED
from .handing import Batch

IDS = ("input_ids", "decoder_input_ids", "token_type_ids", "position_ids")
MASKS = ("attention_mask", "decoder_attention_mask")
NUMBERS = ("pixel_values", "input_features", "input_values", "inputs_embeds")


def check_batches(anatomy: Anatomy, batches: Sequence[Batch]) -> None:
    """DataError names the batch that the model cannot read: by names, types, sizes, or ranges of ids and labels."""
    model, rows = anatomy.model, _table_rows(anatomy)
    for number, batch in enumerate(batches):
        where = f"Calibration batch {number}"
        _check_names(model, batch, where)
        for name, value in batch.items():
            _check_values(name, value, where)
        _check_sizes(model, batch, where)
        for name, value in batch.items():
            if name in IDS and name in rows:
                check_range(value, rows[name], f"{where}: {name}", "the rows of its table in the model")
        if "labels" in batch:
            _check_labels(model, batch["labels"], len(batch[model.main_input_name]), where)
        _check_padding(model, batch, where)


def _check_names(model: PreTrainedModel, batch: Batch, where: str) -> None:
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    unknown = [name for name in batch if name not in parameters]
    if unknown and not takes_any:
        raise DataError(
            f"{where} has {shown(unknown)}, which {type(model).__name__} does not take. Leave it out; it takes "
            f"{', '.join(name for name in parameters)}."
        )


def _check_sizes(model: PreTrainedModel, batch: Batch, where: str) -> None:
    """As many rows in all, none of them empty; masks as long as what they mask; no more tokens than positions."""
    shapes = {name: tuple(value.shape) for name, value in batch.items()}
    main = shapes[model.main_input_name]
    dimensions = {"input_ids": 2, "pixel_values": 4, "input_features": 3}.get(model.main_input_name, len(main))
    if len(main) != dimensions:
        raise DataError(
            f"{where}: {model.main_input_name} has the shape {list(main)}, {dimensions} dimensions are needed. The "
            "first is that of the rows."
        )
    if 0 in main:
        raise DataError(f"{where} is empty: {model.main_input_name} has the shape {list(main)}. Leave it out.")
    towers = {"input_ids", "pixel_values"} <= set(shapes)  # texts and images may be of different number
    for name, shape in shapes.items():
        if shape and shape[0] != main[0] and not towers:
            raise DataError(
                f"{where}: {name} has {shape[0]} rows and {model.main_input_name} {main[0]}. Give as many of each."
            )
    for name in (*IDS, *MASKS):
        of = "decoder_input_ids" if name.startswith("decoder") else "input_ids"
        if name in shapes and of in shapes and len(shapes[name]) == 2 and shapes[name][1] != shapes[of][1]:
            raise DataError(
                f"{where}: {name} has the shape {list(shapes[name])}, {of} {list(shapes[of])}. They must be alike."
            )
    limit = token_limit(model.config, rotary=False)
    texts = ["input_ids", "decoder_input_ids"] + ["labels"] * model.config.is_encoder_decoder
    for name in texts:
        if limit is not None and len(shapes.get(name, ())) == 2 and shapes[name][1] > limit:
            raise DataError(
                f"{where}: {name} has {shapes[name][1]} tokens, the model has {limit} positions. Cut the texts "
                f"(max_length={limit}), or extend the model."
            )


def _check_values(name: str, value: Tensor, where: str) -> None:
    whole = not value.is_floating_point() and not value.is_complex() and value.dtype is not torch.bool
    if value.device.type == "meta":
        raise DataError(f"{where}: {name} is on the meta device and has no values. Give real batches.")
    if name in IDS and (not whole or value.dtype not in (torch.int32, torch.int64)):
        raise DataError(f"{where}: {name} has the dtype {value.dtype}; ids must be torch.int64 (or int32).")
    if name in NUMBERS and not value.is_floating_point():
        raise DataError(f"{where}: {name} has the dtype {value.dtype}; a float one is needed, as processors give it.")
    if value.is_floating_point() and name not in MASKS and not torch.isfinite(value).all():
        raise DataError(f"{where}: {name} has numbers that are not finite (nan or inf). Mend or leave out these rows.")


def _table_rows(anatomy: Anatomy) -> dict[str, int]:
    """How many ids each input may hold; without an entry: any."""
    config, family = anatomy.config, anatomy.family
    text = text_config(config).to_dict()
    rows = {"input_ids": text.get("vocab_size"), "token_type_ids": text.get("type_vocab_size")}
    rows["decoder_input_ids"] = text.get("decoder_vocab_size") or text.get("vocab_size")
    longest = token_limit(config, rotary=False)
    first = family.first_position(config) if family.positions_after_pad else 0
    rows["position_ids"] = None if longest is None else longest + first
    return {name: count for name, count in rows.items() if isinstance(count, int) and count > 0}


def _check_labels(model: PreTrainedModel, labels: Tensor, rows: int, where: str) -> None:
    """Whole numbers are tokens where the model has an output for each token of the vocabulary, else classes."""
    head, config, where = type(model).__name__, model.config, f"{where}: labels"
    output = model.get_output_embeddings()
    if output is not None:
        count, of = output.weight.shape[0], "the tokens of its output"
    elif head.endswith(("SequenceClassification", "ImageClassification", "TokenClassification")):
        count, of = config.num_labels, f"its {config.num_labels} classes"
        if not head.endswith("TokenClassification"):
            problem = getattr(config, "problem_type", None) or (
                "regression" if count == 1 else "of several classes" if labels.is_floating_point() else "of one class"
            )
            if problem not in ("of one class", "single_label_classification"):
                if not labels.is_floating_point() or labels.numel() != rows * count:
                    raise DataError(
                        f"{where} have the dtype {labels.dtype} and the shape {list(labels.shape)}; {head} with "
                        f"num_labels={count} ({problem.replace('_', ' ')}) needs float numbers [{rows}, {count}]."
                    )
                return
    else:
        return
    if labels.dtype is not torch.int64:
        raise DataError(f"{where} have the dtype {labels.dtype}; {head} needs torch.int64: batch['labels'].long().")
    check_range(labels[labels != IGNORED], count, where, f"{of}, and {IGNORED} where there is none")


def _check_padding(model: PreTrainedModel, batch: Batch, where: str) -> None:
    pad = text_config(model.config).to_dict().get("pad_token_id")
    empty = [name for name in MASKS if name in batch and not batch[name].any()]
    if "attention_mask" not in batch and "input_ids" in batch and pad is not None:
        empty += ["input_ids"] if bool((batch["input_ids"] == pad).all()) else []
    if model.config.is_encoder_decoder and "labels" in batch and "decoder_input_ids" not in batch:
        empty += ["labels"] if batch["labels"].ndim == 2 and bool((batch["labels"] == IGNORED).all()) else []
    if empty:
        raise DataError(
            f"{where} holds padding only, by its {empty[0]}: there is nothing in it to judge by. Leave it out, or "
            "look at how the texts are tokenized."
        )
