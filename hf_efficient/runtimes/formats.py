"""The one table of export formats. Light: what writes and runs a program is imported when it is used.

FORMATS["onnx"].packages                       # what must be installed
check_format("onnx", "int8"), check_runtime("onnx")

class Pickled(Format):                         # another format: how it is written, and how it is loaded
    def write(self, model, example, shapes, quantize, folder): ...
    def load(self, folder, threads, exact): ...

FORMATS["pickle"] = Pickled("torch", ("torch",), "torch")
"""

import contextlib
import io
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, unknown_name
from .rounding import ACCURATE, AUTO, INT8, QUANTIZE, STATIC, Rounding, onnx_quantizer, openvino_quantizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

NEAR = 0.95  # of the predictions: fewer that agree are told in a warning
TEXTS = (".json", ".py", ".txt", ".md")  # beside a program and its weights


@dataclass(frozen=True)
class Format:
    """A kind of program.

    Parameters:
        runtime: what runs it, a package whose version reports name.
        packages: what must be installed to write and to run it.
        install: what pip is asked for.
        quantizes: the ways to 8 bits that `write` has, of `rounding.QUANTIZE`.
        calibrated: those of them that look at rows.
        quantizer_packages: what must be installed for them beside `packages`.
        holds_tokenizer: whether a file of it has the tokenizer inside; then `write` takes one more, `tokenizer`.
        caches: whether decoders can be written with a cache (decoder.py).
    """

    runtime: str
    packages: tuple[str, ...]
    install: str
    quantizes: tuple[str, ...] = ()
    calibrated: tuple[str, ...] = ()
    quantizer_packages: tuple[str, ...] = ()
    holds_tokenizer: bool = False
    caches: bool = False

    def write(
        self,
        model: "PreTrainedModel",
        example: dict[str, "Tensor"],
        shapes: Mapping[str, dict[int, Any]],
        quantize: Rounding | None,
        folder: Path,
    ) -> None:
        """Write a program that takes inputs as the example; `shapes`: which of their sizes are free, for torch.export.

        What it raises becomes an UnsupportedModelError, but for an OSError.
        """
        raise NotImplementedError

    def load(self, folder: Path, threads: int, exact: bool) -> tuple[Callable[..., Any], Collection[str]]:
        """The program, called as the model is, and the names of its inputs.

        `exact`: in float32 also where the runtime would choose bfloat16.
        """
        raise NotImplementedError

    def missing(self) -> list[str]:
        """What must still be installed."""
        return [name for name in self.packages if find_spec(name) is None]

    def version(self) -> str:
        """`onnxruntime 1.32.0`."""
        from importlib.metadata import version

        return f"{self.runtime} {version(self.runtime)}"


@dataclass(frozen=True)
class Exporter(Format):
    """What `transformers.exporters` writes; `backend` is its name there."""

    backend: str = ""

    def write(
        self,
        model: "PreTrainedModel",
        example: dict[str, "Tensor"],
        shapes: Mapping[str, dict[int, Any]],
        quantize: Rounding | None,
        folder: Path,
    ) -> None:
        import torch
        from transformers.exporters.auto import EXPORT_BACKENDS, get_exporter_class

        options: dict[str, Any] = {"dynamic_shapes": shapes}
        if quantize is not None:
            options["quantizer"] = self._known_quantizer(quantize)
        config = EXPORT_BACKENDS[self.backend].config(**options)
        with hushed(), torch.no_grad():
            exported = get_exporter_class(self.backend)().export(model, dict(example), config=config)
            self.improve(exported.program)
            exported.save_pretrained(folder)

    def load(self, folder: Path, threads: int, exact: bool) -> tuple[Callable[..., Any], Collection[str]]:
        from transformers.exporters import ExportedModel

        with hushed():
            program = ExportedModel.from_pretrained(folder, **self.options(threads, exact))
        [component] = program.components.values()
        traced = component.metadata.kwargs
        if "past_key_values" in traced:
            from .decoder import CachedProgram

            return CachedProgram(program, traced), traced
        return program, traced

    def options(self, threads: int, exact: bool) -> dict[str, Any]:
        """For the runtime: as many threads as PyTorch has, where it would take all cores by itself."""
        return {}

    def _known_quantizer(self, quantize: Rounding) -> Any:
        try:
            return self.quantizer(quantize)
        except ImportError as error:
            raise ConfigError(f"quantize needs a newer transformers ({error}): pip install -U transformers.") from None

    def quantizer(self, quantize: Rounding) -> Any:
        """What the exporter hands the finished program to."""
        raise NotImplementedError

    def improve(self, program: Any) -> None:
        """Change the program before it is written."""


class Onnx(Exporter):
    def options(self, threads: int, exact: bool) -> dict[str, Any]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        return {"session_options": options}

    def quantizer(self, quantize: Rounding) -> Any:
        return onnx_quantizer(quantize)

    def improve(self, program: Any) -> None:
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


class OpenVino(Exporter):
    def quantizer(self, quantize: Rounding) -> Any:
        return openvino_quantizer(quantize)

    def options(self, threads: int, exact: bool) -> dict[str, Any]:
        return {"config": {"INFERENCE_NUM_THREADS": threads} | ({"INFERENCE_PRECISION_HINT": "f32"} if exact else {})}


@dataclass(frozen=True)
class Gguf(Format):
    """For llama.cpp and all that is built on it; run here by one of the packages that carry it."""

    def write(
        self,
        model: "PreTrainedModel",
        example: dict[str, "Tensor"],
        shapes: Mapping[str, dict[int, Any]],
        quantize: Rounding | None,
        folder: Path,
        tokenizer: Any = None,
    ) -> None:
        from .gguf import FILE, write_gguf

        write_gguf(model, tokenizer, folder / FILE, None if quantize is None else quantize.method)

    def load(self, folder: Path, threads: int, exact: bool) -> tuple[Callable[..., Any], Collection[str]]:
        from .gguf import FILE
        from .llamacpp import LlamaCpp

        return LlamaCpp(folder / FILE, threads, exact), ("input_ids", "attention_mask")

    def missing(self) -> list[str]:
        from .llamacpp import BINDINGS, installed

        return super().missing() + ([] if installed() else [" or ".join(reversed(BINDINGS))])

    def version(self) -> str:
        from importlib.metadata import version

        from .llamacpp import BINDINGS, installed

        name = BINDINGS[installed() or next(iter(BINDINGS))]
        return f"{name} {version(name)}"


FORMATS: dict[str, Format] = {
    "onnx": Onnx(
        "onnxruntime",
        ("onnx", "onnxscript", "onnxruntime"),
        "hf-efficient[export]",
        quantizes=(INT8, STATIC),
        calibrated=(STATIC,),
        caches=True,
        backend="onnx",
    ),
    "openvino": OpenVino(
        "openvino",
        ("openvino",),
        "hf-efficient[openvino]",
        quantizes=(INT8, ACCURATE),
        calibrated=(INT8, ACCURATE),
        quantizer_packages=("nncf",),
        backend="openvino",
    ),
    "executorch": Exporter("executorch", ("executorch",), "hf-efficient[executorch]", backend="executorch"),
    "torch": Exporter("torch", ("torch",), "hf-efficient[torch]", backend="dynamo"),
    "gguf": Gguf("llama.cpp", ("gguf",), "hf-efficient[llamacpp]", quantizes=(INT8,), holds_tokenizer=True),
}


def check_format(format: str, quantize: str | None = None, cache: bool = False) -> Format:
    """The format of that name; ConfigError for an unknown one, or one that does not quantise or has no cache."""
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    if quantize is not None and quantize not in QUANTIZE:
        raise unknown_name("quantize", quantize, QUANTIZE)
    ways = FORMATS[format].quantizes
    if quantize is not None and not ways:
        able = ", ".join(name for name, other in FORMATS.items() if other.quantizes)
        raise ConfigError(
            f"format {format!r} is not quantised here, only {able}. Leave quantize out, or change format."
        )
    if quantize not in (None, AUTO, *ways):
        raise ConfigError(f"format {format!r} has no quantize {quantize!r}, only {', '.join((*ways, AUTO))}.")
    if cache and quantize not in (None, INT8):
        raise ConfigError(
            f"a decoder with a cache is quantised by {INT8!r} alone, not {quantize!r}. Change one of them."
        )
    if cache and not FORMATS[format].caches:
        able = ", ".join(name for name, other in FORMATS.items() if other.caches)
        more = " llama.cpp has its own." if format == "gguf" else ""
        raise ConfigError(f"format {format!r} has no cache here, only {able}. Leave it out, or change format.{more}")
    return FORMATS[format]


def check_runtime(format: str) -> None:
    """Before any long work: ConfigError, with the pip command, unless what makes and runs this format is installed."""
    chosen = FORMATS[format]
    if missing := chosen.missing():
        raise ConfigError(f'format {format!r} needs {", ".join(missing)}. Run `pip install "{chosen.install}"`.')
    if isinstance(chosen, Exporter) and find_spec("transformers.exporters") is None:
        raise ConfigError(f"format {format!r} needs a transformers with exporters: pip install -U transformers.")


def check_quantizer(format: str, quantize: str | None) -> None:
    """Before any long work: ConfigError unless what makes 8 bits of this format is installed."""
    chosen = FORMATS[format]
    if quantize is not None and (missing := [name for name in chosen.quantizer_packages if find_spec(name) is None]):
        raise ConfigError(
            f'quantize of format {format!r} needs {", ".join(missing)}. Run `pip install "{chosen.install}"`.'
        )


def runtime_version(format: str) -> str:
    return FORMATS[format].version()


def folder_name(format: str, quantize: str | None, cache: bool = False) -> str:
    """Where a recipe puts it, beside the model: `onnx`, `onnx-int8`, `onnx-cache-int8`."""
    return "-".join([format, *["cache"] * cache, *([] if quantize is None else [quantize])])


def program_bytes(folder: Path) -> int:
    """Bytes of the exported program and its weights: all files but texts."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and path.suffix not in TEXTS)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """The exporters tell their progress on stdout, and by warnings that ask for other versions of their packages."""
    import warnings

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "transformers.exporters", None)]
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
