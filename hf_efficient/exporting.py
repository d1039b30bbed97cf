"""A model for another runtime, through `transformers.exporters`, with proof that it computes the same.

    exported = export(model, "onnx", "out/onnx", inputs=batches)             # or openvino, executorch, torch
    exported = export(model, "onnx", "out/onnx-int8", inputs=batches, quantize="int8")
    exported.difference                                                     # largest, of the largest logit

    from transformers.exporters import ExportedModel
    ExportedModel.from_pretrained("out/onnx")(**batch).logits               # neither hf_efficient nor its classes

Batch and length stay free. A causal model is exported as one forward over a text, without a cache.
"""

import contextlib
import inspect
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, UnsupportedModelError, unknown_name
from .io.disk import check_empty, new_folder
from .quantization import check_floats

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

QUANTIZE = ("int8",)
SAME = 1e-3  # of the largest output: other runtimes, computing in float32 too, are 1e-7 to 1e-4 away from PyTorch
EXAMPLES = ((2, 16), (1, 7), (3, 33))  # batch and tokens of made-up inputs; the first one is traced


@dataclass(frozen=True)
class Format:
    """How a format is called by transformers, which package runs it, and what this asks pip for."""

    backend: str
    runtime: str
    packages: tuple[str, ...]
    quantizes: bool = False


FORMATS: dict[str, Format] = {
    "onnx": Format("onnx", "onnxruntime", ("onnx", "onnxscript", "onnxruntime"), quantizes=True),
    "openvino": Format("openvino", "openvino", ("openvino",)),
    "executorch": Format("executorch", "executorch", ("executorch",)),
    "torch": Format("dynamo", "torch", ("torch",)),
}


@dataclass(frozen=True)
class Exported:
    """What `export` made.

    Parameters:
        difference: largest difference of an output to PyTorch's on real inputs, as a part of the largest output.
        same_prediction: fraction of outputs with the same largest entry.
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


def export(
    model: "PreTrainedModel",
    format: str,
    output_dir: str | Path,
    *,
    inputs: Sequence[Mapping[str, "torch.Tensor"]] | None = None,
    quantize: str | None = None,
) -> Exported:
    """Write `model` for another runtime into `output_dir`, load it there, and compare it with PyTorch.

    Parameters:
        model: with a head that gives `logits`, or a base model with `last_hidden_state`.
        format: one of `FORMATS`.
        output_dir: new or empty. `ExportedModel.from_pretrained` loads it.
        inputs: real batches (labels are left out) of two or more rows; the first one is traced, all are compared.
            Default: made-up ones of several shapes.
        quantize: `"int8"`: weights of 8 bits, activations as they come (ONNX Runtime's dynamic quantisation). How far
            that is from PyTorch is told, not judged.

    Raises:
        ConfigError: an unknown format, a package that is missing, a format that does not quantise.
        UnsupportedModelError: the model cannot be exported, is quantised already, or the format computes another
            output.
        CheckpointError: `output_dir` is not empty.
    """
    chosen = check_format(format, quantize)
    check_runtime(format)
    check_floats(model, "Export the one it was made of; quantize='int8' gives 8 bits there.")
    folder = check_empty(output_dir)
    from .measure.context import evaluating
    from .runtime import Runtime

    batches = [_tensors(model, batch) for batch in inputs] if inputs else _made_up(model)
    # Made before the work, so that what cannot be written is not found out after it.
    with new_folder(folder) as made, _without_cache(model), _as_it_was(model):
        _write(model, chosen, batches[0], quantize, made)
        runtime = Runtime(model, format, made, exact=True)
        with evaluating(model, runtime):
            pairs = [(model(**batch), runtime(**batch)) for batch in batches]
        difference, same = _compare(pairs, batches)
        if quantize is None and not difference <= SAME:
            raise UnsupportedModelError(
                f"The {format} export of {type(model).__name__} computes another output: {difference:.2g} of the "
                f"largest one away, where {SAME:g} is allowed. Try another format: {', '.join(FORMATS)}."
            )
    shapes = tuple(tuple(batch[model.main_input_name].shape) for batch in batches)
    return Exported(format, runtime_version(format), quantize, folder, program_bytes(folder), difference, same, shapes)


def check_format(format: str, quantize: str | None = None) -> Format:
    """The format of that name.

    Raises:
        ConfigError: an unknown name, or one that does not quantise.
    """
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    if quantize is not None and quantize not in QUANTIZE:
        raise unknown_name("quantize", quantize, QUANTIZE)
    if quantize is not None and not FORMATS[format].quantizes:
        able = ", ".join(name for name, other in FORMATS.items() if other.quantizes)
        raise ConfigError(
            f"format {format!r} is not quantised here, only {able}. Leave quantize out, or change format."
        )
    return FORMATS[format]


def check_runtime(format: str) -> None:
    """Before any long work: is what makes and runs this format installed?

    Raises:
        ConfigError: it is not; the message has the pip command.
    """
    if missing := [name for name in FORMATS[format].packages if find_spec(name) is None]:
        extra = "export" if format == "onnx" else format
        raise ConfigError(f'format {format!r} needs {", ".join(missing)}. Run `pip install "hf-efficient[{extra}]"`.')
    if find_spec("transformers.exporters") is None:
        raise ConfigError(f"format {format!r} needs a transformers with exporters: pip install -U transformers.")


def runtime_version(format: str) -> str:
    """`onnxruntime 1.32.0`."""
    name = FORMATS[format].runtime
    return f"{name} {version(name)}"


def folder_name(format: str, quantize: str | None) -> str:
    """Where a recipe puts it, beside the model: `onnx`, `onnx-int8`."""
    return format if quantize is None else f"{format}-{quantize}"


def program_bytes(folder: Path) -> int:
    """Bytes of the exported program and its weights: all files but texts."""
    skipped = (".json", ".py", ".txt", ".md")
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and path.suffix not in skipped)


def _write(model: Any, chosen: Format, example: dict[str, Any], quantize: str | None, folder: Path) -> None:
    import torch
    from transformers.exporters.auto import EXPORT_BACKENDS, get_exporter_class

    options: dict[str, Any] = {"dynamic_shapes": {name: _free(value) for name, value in example.items()}}
    if quantize is not None:
        try:
            from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer
        except ImportError as error:
            raise ConfigError(f"quantize needs a newer transformers ({error}): pip install -U transformers.") from None
        options["quantizer"] = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True, reduce_range=False))
    config = EXPORT_BACKENDS[chosen.backend].config(**options)
    try:
        with hushed(), torch.no_grad():
            exported = get_exporter_class(chosen.backend)().export(model, example, config=config)
            if chosen.backend == "onnx":
                _keep_norms(exported.program)
            exported.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # the exporters raise whatever the compilers below them raise
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be exported as {chosen.backend}: {type(error).__name__}: "
            f"{str(error).strip()[:500]} Try another format: {', '.join(FORMATS)}."
        ) from error


def _keep_norms(program: Any) -> None:
    """Write the residual additions before layer norms as `Sum`, which is the same.

    ONNX Runtime fuses `Add` and `LayerNormalization` to SkipLayerNormalization, whose CPU kernel adds up number by
    number: 1.0 ms for 512 x 384 on one thread, where the two by themselves take 0.2 (onnxruntime 1.32). What
    the fusion would bring on CUDA was not measured.
    """
    for node in program.graph:
        if node.op_type == "LayerNormalization":
            addition = node.inputs[0].producer()
            if addition is not None and addition.op_type == "Add":
                addition.op_type = "Sum"


def _free(value: Any) -> dict[int, Any]:
    """Which sizes of an input may change: the batch, and of tokens the length."""
    import torch

    auto = torch.export.Dim.AUTO
    return {0: auto, 1: auto} if value.dim() == 2 else {0: auto}


def _tensors(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the forward of the model takes of a batch; an encoder-decoder reads its labels as its own output."""
    import torch

    taken = inspect.signature(model.forward).parameters
    tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    labels = tensors.pop("labels", None)
    for name in ("start_positions", "end_positions"):  # with them the forward would give a loss
        tensors.pop(name, None)
    if labels is not None and labels.dim() == 2 and hasattr(model, "prepare_decoder_input_ids_from_labels"):
        tensors.setdefault("decoder_input_ids", model.prepare_decoder_input_ids_from_labels(labels=labels))
    return {name: value for name, value in tensors.items() if name in taken}


def _made_up(model: Any) -> list[dict[str, Any]]:
    import torch

    from .measure.inputs import dummy_inputs

    limit = getattr(model.config, "max_position_embeddings", None) or EXAMPLES[-1][1]
    made = []
    for seed, (batch, length) in enumerate(EXAMPLES):
        inputs = dummy_inputs(model, batch, min(length, limit), seed)
        if "token_type_ids" in inspect.signature(model.forward).parameters and "input_ids" in inputs:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        if "decoder_input_ids" in inputs:  # one token would be traced as the only number there can be
            start = inputs["decoder_input_ids"]
            inputs["decoder_input_ids"] = start.repeat(1, 2 + seed)
        made.append(inputs)
    return made


def _compare(pairs: list[tuple[Any, Any]], batches: list[dict[str, Any]]) -> tuple[float, float]:
    """Largest difference as a part of the largest output, and how many outputs have the same largest entry."""
    import torch

    difference = largest = 0.0
    same = total = 0
    for (expected, found), batch in zip(pairs, batches, strict=True):
        ours, theirs = expected[0], torch.as_tensor(found[0])
        mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
        if mask is not None and ours.dim() == 3 and mask.shape == ours.shape[:2]:
            ours, theirs = ours[mask.bool()], theirs[mask.bool()]  # what stands at padding is nobody's business
        difference = max(difference, (ours - theirs).abs().max().item())
        if not bool(torch.isfinite(theirs).all()):
            difference = float("nan")
            break
        largest = max(largest, ours.abs().max().item())
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        total += ours[..., 0].numel()
    return difference / largest if largest else difference, same / max(total, 1)


@contextlib.contextmanager
def _without_cache(model: Any) -> Iterator[None]:
    """One forward gives outputs, not keys and values for a next one."""
    config = model.config
    kept = getattr(config, "use_cache", None)
    if kept:
        config.use_cache = False
    try:
        yield
    finally:
        if kept:
            config.use_cache = kept


@contextlib.contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """In eval mode and on the CPU while it is traced."""
    from .measure.context import eval_mode

    device = next(model.parameters()).device
    model.to("cpu")
    try:
        with eval_mode(model):
            yield
    finally:
        model.to(device)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """The exporters tell their progress on stdout, and by warnings that ask for other versions of their packages."""
    import warnings

    names = ["torch.onnx", "torch.export", "transformers.exporters", "root"]
    loggers = [logging.getLogger(name if name != "root" else None) for name in names]
    levels = [each.level for each in loggers]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in loggers:
            each.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for each, level in zip(loggers, levels, strict=True):
                each.setLevel(level)
