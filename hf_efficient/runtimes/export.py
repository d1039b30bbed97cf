"""A model for another runtime, through `transformers.exporters`, with proof that it computes the same.

    exported = export(model, "onnx", "out/onnx", inputs=batches)             # or openvino, executorch, torch
    exported = export(model, "onnx", "out/onnx-int8", inputs=batches, quantize="int8")
    export(model, "openvino", "out/int8", inputs=batches, quantize="int8", calibration=training_batches)
    export(model, "onnx", "out/onnx-cache", cache=True)                     # a decoder that writes (decoder.py)
    exported.difference                                                     # largest, of the largest logit

    from transformers.exporters import ExportedModel
    ExportedModel.from_pretrained("out/onnx")(**batch).logits               # neither hf_efficient nor its classes

Batch and length stay free. Without `cache` a causal model is exported as one forward over a text.
"""

import contextlib
import functools
import inspect
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, HfEfficientError, UnsupportedModelError
from ..io.disk import check_empty, new_folder
from ..models.checks import check_floats
from .formats import FORMATS, NEAR, check_format, check_quantizer, check_runtime, program_bytes, runtime_version
from .rounding import ACCURATE, AUTO, LEAST, Rounding
from .rows import check_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

SAME = 1e-3  # of the largest output: other runtimes, computing in float32 too, are 1e-7 to 1e-4 away from PyTorch
EXAMPLES = ((2, 16), (1, 7), (3, 33))  # batch and tokens of made-up inputs; the first one is traced
OTHERS = ((1, 3), (5, 21))  # and of those that must run too where inputs are given


@dataclass(frozen=True)
class Exported:
    """What `export` made.

    Parameters:
        difference: largest difference of an output to PyTorch's on real inputs, as a part of the largest output.
        same_prediction: fraction of outputs with the same largest entry; a single one: nearer than 5 % of the largest.
        checked: shapes of the inputs that were compared.
    """

    format: str
    runtime: str
    quantize: str | None
    folder: Path
    bytes_on_disk: int
    difference: float
    same_prediction: float
    checked: tuple[tuple[int, ...], ...]
    cache: bool = False


def export(
    model: "PreTrainedModel",
    format: str,
    output_dir: str | Path,
    *,
    inputs: Sequence[Mapping[str, "torch.Tensor"]] | None = None,
    quantize: str | None = None,
    cache: bool = False,
    min_agreement: float | None = None,
    tokenizer: Any = None,
    calibration: Sequence[Mapping[str, "torch.Tensor"]] | None = None,
) -> Exported:
    """Write `model` for another runtime into `output_dir`, load it there, and compare it with PyTorch.

    Parameters:
        model: with a head that gives `logits`, or a base model with `last_hidden_state`.
        format: one of `FORMATS`. output_dir: new or empty. `ExportedModel.from_pretrained` loads it.
        inputs: real batches (labels are left out); the first one is traced, all are compared. Default: made-up ones of
            several shapes. Other numbers of rows and tokens are tried as well.
        quantize: a way to 8 bits of the format (`rounding`), as `"int8"`; 7 of them, so that all processors agree.
        cache: of a decoder: it takes keys and values of earlier tokens, so that a token more costs one token (onnx).
        min_agreement: smallest `same_prediction` that is good enough. Without it, less than 0.95 is a warning.
        tokenizer: of the model, for a format that holds one (gguf).
        calibration: a hundred batches of rows that it was trained on, best of one each, for ways that look at some.

    Raises:
        ConfigError: an unknown format, a package that is missing, a format that does not quantise or has no cache, no
            tokenizer, no calibration.
        UnsupportedModelError: the model cannot be exported, is quantised already, or what was made computes another
            output, takes no other shapes, or agrees less than `min_agreement`.
        CheckpointError: `output_dir` is not empty.
    """
    check_format(format, quantize, cache)
    check_runtime(format)
    _check_options(format, quantize, min_agreement, tokenizer, calibration)
    check_floats(model, "Export the one it was made of; quantize='int8' gives 8 bits there.")
    folder = check_empty(output_dir)
    check_rows(model.config, lambda: model)
    from ..models.modes import evaluating

    batches = [_tensors(model, batch) for batch in inputs] if inputs else _made_up(model)
    if cache:
        from .decoder import check_decoder, texts

        check_decoder(model)
        batches = [texts(batch) for batch in batches]
    # Made before the work, so that what cannot be written is not found out after it.
    with new_folder(folder) as made, _traceable(model, cache):
        rounding = None if quantize is None else _rounding(model, quantize, calibration or (), min_agreement)
        _write(model, format, _several(batches[0]), rounding, made, cache, tokenizer)
        readers = _readers(model, format, made, cache)
        with evaluating(model):
            difference, same = _compared(model, readers, batches)
            others = _compared(model, readers, _others(model, batches[0])) if inputs else (0.0, 1.0)
        what = f"The {format} export of {type(model).__name__}"
        if fault := _fault(what, difference, same, others, quantize, min_agreement):
            raise UnsupportedModelError(fault)
    shapes = tuple(tuple(batch[model.main_input_name].shape) for batch in batches)
    size, version = program_bytes(folder), runtime_version(format)
    return Exported(format, version, quantize, folder, size, difference, same, shapes, cache)


def _check_options(format: str, quantize: str | None, min_agreement: Any, tokenizer: Any, calibration: Any) -> None:
    check_quantizer(format, quantize)
    if quantize == AUTO:
        raise ConfigError(
            "quantize='auto' chooses by the score of a recipe's task (- export: {quantize: auto}). "
            f"Here name one of {', '.join(FORMATS[format].quantizes)}."
        )
    if quantize in FORMATS[format].calibrated and not calibration:
        raise ConfigError(
            f"quantize={quantize!r} of format {format!r} finds the ranges of activations on rows that the model was "
            "trained on: give some, calibration=[batch, ...], or use a recipe, which takes its own."
        )
    if min_agreement is not None and not (isinstance(min_agreement, (int, float)) and 0 <= min_agreement <= 1):
        raise ConfigError(f"min_agreement must be a number from 0 to 1, got {min_agreement!r}.")
    if FORMATS[format].holds_tokenizer and tokenizer is None:
        raise ConfigError(
            f"format {format!r} holds the tokenizer: give it, tokenizer=AutoTokenizer.from_pretrained(...)."
        )


def _write(
    model: Any,
    format: str,
    example: dict[str, Any],
    quantize: Rounding | None,
    folder: Path,
    cache: bool = False,
    tokenizer: Any = None,
) -> None:
    more = {"tokenizer": tokenizer} if FORMATS[format].holds_tokenizer else {}
    traced = model
    if cache:
        from .decoder import traced_decoder

        traced, example = traced_decoder(model, example)
    try:
        FORMATS[format].write(traced, example, _free(example), quantize, folder, **more)
        if cache:
            model.generation_config.save_pretrained(folder)  # with the token that ends a text
    except (OSError, HfEfficientError):
        raise
    except Exception as error:  # the exporters raise whatever the compilers below them raise
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be exported as {format}: {type(error).__name__}: "
            f"{str(error).strip()[:500]} Try another format: {', '.join(FORMATS)}."
        ) from error


def _rounding(model: Any, method: str, calibration: Sequence[Mapping], least: float | None) -> Rounding:
    """With the outputs of the model itself, where those of the program are held against them."""
    rows = [_tensors(model, batch) for batch in calibration]
    if method != ACCURATE:
        return Rounding(method, rows)
    from ..models.modes import evaluating

    with evaluating(model):
        expected = [model(**row)[0] for row in rows]

    def agreement(number: int, computed: Any) -> float:
        same, total = _agreeing(*_real(expected[number], computed, rows[number]))
        return same / max(total, 1)

    return Rounding(method, rows, agreement, LEAST if least is None else least)


def _readers(model: Any, format: str, folder: Path, cache: bool) -> list[Callable]:
    """The program, in each of the ways in which it will be called."""
    from .runtime import Runtime

    runtime = Runtime(model, format, folder, exact=True).eval()
    if not cache:
        return [runtime]
    from .decoder import in_pieces

    return [runtime, functools.partial(in_pieces, runtime)]


def _free(value: Any) -> dict[Any, Any]:
    """Which sizes of an input may change: the batch, and of tokens the length, the third size of a cache."""
    import torch

    if isinstance(value, Mapping):
        return {name: _free(each) for name, each in value.items()}
    auto, length = torch.export.Dim.AUTO, {2: 1, 4: 2}.get(value.dim())
    return {0: auto} if length is None else {0: auto, length: auto}


def _tensors(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the forward of the model takes of a batch; an encoder-decoder reads its labels as its own output."""
    import torch

    arguments = inspect.signature(model.forward).parameters
    tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    labels = tensors.pop("labels", None)
    for name in ("start_positions", "end_positions"):  # with them the forward would give a loss
        tensors.pop(name, None)
    if labels is not None and labels.dim() == 2 and hasattr(model, "prepare_decoder_input_ids_from_labels"):
        tensors.setdefault("decoder_input_ids", model.prepare_decoder_input_ids_from_labels(labels=labels))
    return {name: value for name, value in tensors.items() if name in arguments}


def _made_up(model: Any) -> list[dict[str, Any]]:
    examples = [_made_up_one(model, batch, length, seed) for seed, (batch, length) in enumerate(EXAMPLES)]
    for example in examples:
        example.pop("decoder_attention_mask", None)
    return examples


def _made_up_one(model: Any, batch: int, length: int, seed: int) -> dict[str, Any]:
    import torch

    from ..models.inputs import dummy_inputs
    from ..models.registry import token_limit

    limit = token_limit(model.config) or length
    inputs = dummy_inputs(model, batch, min(length, limit), seed)
    if "token_type_ids" in inspect.signature(model.forward).parameters and "input_ids" in inputs:
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    if "decoder_input_ids" in inputs:
        start = inputs["decoder_input_ids"]
        inputs["decoder_input_ids"] = start.repeat(1, 2 + seed)
        if "decoder_attention_mask" in inspect.signature(model.forward).parameters:
            inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
    return inputs


def _several(example: dict[str, Any]) -> dict[str, Any]:
    """The example with two rows and three tokens at least: a size of 1 would be traced as the only one."""
    several = {}
    for name, value in example.items():
        times = [1] * value.dim()
        times[0] = 2 if value.shape[0] == 1 else 1
        if value.dim() == 2 and value.shape[1] == 1:
            times[1] = 3
        several[name] = value.repeat(times)
    return several


def _others(model: Any, example: dict[str, Any]) -> list[dict[str, Any]]:
    """Inputs of other shapes with the names of the example: made up, or, where that cannot be, its first row alone and
    again."""
    try:
        others = [_made_up_one(model, batch, length, seed) for seed, (batch, length) in enumerate(OTHERS)]
    except (ConfigError, UnsupportedModelError):
        others = [{}]
    if not all(example.keys() <= other.keys() for other in others):
        first = {name: value[:1] for name, value in example.items()}
        return [{name: row.repeat(rows, *[1] * (row.dim() - 1)) for name, row in first.items()} for rows in (1, 5)]
    return [{name: other[name] for name in example} for other in others]


def _compared(model: Any, readers: Sequence[Callable], batches: list[dict[str, Any]]) -> tuple[float, float]:
    """Largest difference as a part of the largest output, and how many outputs have the same largest entry.

    Raises:
        UnsupportedModelError: the program does not take inputs that the model takes.
    """
    import torch

    difference = largest = 0.0
    same = total = 0
    for batch, reader in itertools.product(batches, readers):
        expected = model(**batch)
        try:
            computed = reader(**batch)
        except Exception as error:  # each runtime has its own
            shapes = {name: tuple(value.shape) for name, value in batch.items()}
            raise UnsupportedModelError(
                f"The export of {type(model).__name__} does not take {shapes}, which the model takes: "
                f"{type(error).__name__}: {str(error).strip()[:300]} Try another format: {', '.join(FORMATS)}."
            ) from error
        ours, theirs = _real(expected[0], computed[0], batch)
        if ours.shape != theirs.shape or not bool(torch.isfinite(theirs).all()):
            return float("nan"), 0.0
        difference = max(difference, (ours - theirs).abs().max().item())
        largest = max(largest, ours.abs().max().item())
        equal, all_of_them = _agreeing(ours, theirs)
        same, total = same + equal, total + all_of_them
    return difference / largest if largest else difference, same / max(total, 1)


def _real(expected: Any, computed: Any, batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """Both outputs but for those at padding, which mean nothing."""
    import torch

    computed, mask = torch.as_tensor(computed), batch.get("decoder_attention_mask", batch.get("attention_mask"))
    if mask is not None and expected.dim() == 3 and mask.shape == expected.shape[:2] == computed.shape[:2]:
        return expected[mask.bool()], computed[mask.bool()]
    return expected, computed


def _agreeing(ours: Any, theirs: Any) -> tuple[int, int]:
    """How many predictions are the same, and of how many."""
    agree = (ours - theirs).abs() <= (1 - NEAR) * ours.abs().max()
    same = (ours.argmax(-1) == theirs.argmax(-1)).sum() if ours.shape[-1] > 1 else agree.sum()
    return int(same), ours[..., 0].numel()


def _fault(
    what: str, difference: float, same: float, others: tuple[float, float], quantize: str | None, needed: float | None
) -> str | None:
    """Why what was made is not good enough, if so; of 8 bits that are far off by themselves, a warning."""
    formats = f"Try another format: {', '.join(FORMATS)}."
    if quantize is None and not (difference <= SAME and others[0] <= SAME):
        where = "" if not difference <= SAME else " at other numbers of rows and tokens"
        off = max(difference, others[0]) if where else difference
        return (
            f"{what} computes another output{where}: {off:.2g} of the largest one away, where {SAME:g} is allowed. "
            f"{formats}"
        )
    if math.isnan(difference) or math.isnan(others[0]):
        return f"{what} gives numbers that are not finite. {formats}"
    if same < (needed or 0):
        return f"{what} gives the same prediction in {same:.1%}, less than min_agreement={needed:g}. {formats}"
    if needed is None and same < NEAR:
        logger.warning("%s gives the same prediction in only %.1f %% of the cases.", what, 100 * same)
    return None


@contextlib.contextmanager
def _traceable(model: Any, cache: bool = False) -> Iterator[None]:
    """In eval mode, on the CPU, and, but for a decoder with a cache, giving outputs alone: not keys and values for a
    next forward."""
    from ..models.modes import eval_mode

    device, own = next(model.parameters()).device, getattr(model.config, "use_cache", None)
    switched = own and not cache
    if switched:
        model.config.use_cache = False
    model.to("cpu")
    try:
        with eval_mode(model):
            yield
    finally:
        model.to(device)
        if switched:
            model.config.use_cache = own
