"""What was measured, as plain data: `report.json` is the only source of the card, the plots and the tables.

    report = load_report("out")                       # out/report.json
    print(report.student.size.parameters, report.comparison.speedup)
    report.save("copy/report.json")                   # atomic; load_report gives back an equal Report

Units are in the names: `_ms` milliseconds, `_bytes` bytes; ratios are student / teacher, except `speedup`, which is
teacher time / student time. A report never holds a token or an absolute path: both are removed when it is made.
"""

import datetime
import json
import math
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, shown, unknown_name
from ..io.codec import clean, decode, encode
from ..io.disk import write_atomic
from ..io.environment import Environment, package_commit
from ..io.json import parse_json, read_text
from .ladder import Ladder
from .language import Decoding, Domain, Generation
from .timing import LATER, UNSAID, ExportedTeacher, Latency, LengthPoint, Serving

SCHEMA_VERSION = 1
REPORT_FILE = "report.json"
LOADS_WITH = ("portable", "plugin")
LIBRARIES = ("transformers", "sentence-transformers")
MAX_ITEMS = 20_000  # stages, layers, warnings and the like: above any real model
# What may stand in code that a reader copies: the Auto classes that transformers could have.
_AUTO_MODEL, _AUTO_PROCESSOR = re.compile(r"AutoModel[A-Za-z0-9]{0,60}"), re.compile(r"Auto[A-Za-z0-9]{1,60}")


@dataclass(frozen=True)
class Workload:
    """One timed forward; `input_shape` is that of the main input, `[B, T]` tokens or `[B, C, height, width]`."""

    batch_size: int
    sequence_length: int | None
    input_shape: tuple[int, ...]
    threads: int
    dtype: str
    device: str


@dataclass(frozen=True)
class Size:
    """Parameters are counted once when shared. MACs and peak memory belong to one forward of the workload.

    Parameters:
        embedding_parameters: weights of lookup tables (`torch.nn.Embedding`), a head tied to one included.
        weight_bytes: the weights as loaded; `bytes_on_disk` is the checkpoint folder's weight files, if there is one.
        peak_memory_bytes: weights plus the largest amount allocated at any moment of the forward.
    """

    parameters: int
    embedding_parameters: int
    nonzero_parameters: int
    weight_bytes: int
    macs: int
    peak_memory_bytes: int
    bytes_on_disk: int | None = None

    @property
    def non_embedding_parameters(self) -> int:
        """Everything but lookup tables."""
        return self.parameters - self.embedding_parameters

    @property
    def sparsity(self) -> float:
        """The fraction of parameters that are zero."""
        return 1 - self.nonzero_parameters / self.parameters if self.parameters > 0 else 0.0

    @property
    def is_sparse(self) -> bool:
        """More than a percent of zeros: biases and padding rows of a dense model are zero too."""
        return self.sparsity > 0.01


@dataclass(frozen=True)
class Score:
    """One quality number with its standard error over the samples."""

    name: str
    value: float
    standard_error: float
    higher_is_better: bool


NO_SCORE = Score("", math.nan, math.nan, True)


@dataclass(frozen=True)
class Quality:
    """Scores on a data set, the task's main score first; `targets` counts labels (tokens for text generation), and
    `largest_class` is the part of the samples that the most frequent class has, which anyone can guess."""

    task: str
    samples: int
    targets: int
    scores: tuple[Score, ...]
    largest_class: float | None = field(default=None, metadata=UNSAID)

    @property
    def main(self) -> Score:
        return self.scores[0] if self.scores else NO_SCORE


@dataclass(frozen=True)
class Comparison:
    """Student against teacher, measured in one interleaved run.

    Parameters:
        speedup: teacher median time / student median time; above 1 the student is faster.
        paired_speedup: the median over rounds of teacher time / student time of the same round.
        quality_difference: student - teacher in the main score, on the same samples, with its paired standard error.
        agreement: fraction of targets for which both predict the same.
        similarity: of embeddings, Spearman's correlation of the cosines of both.
    """

    speedup: float
    paired_speedup: float
    parameter_ratio: float
    mac_ratio: float
    weight_bytes_ratio: float
    memory_ratio: float
    quality_score: str | None = None
    quality_difference: float | None = None
    quality_difference_error: float | None = None
    agreement: float | None = None
    similarity: float | None = field(default=None, metadata=UNSAID)


@dataclass(frozen=True)
class Energy:
    """What running costs: processor, memory and GPUs of the process while `inputs` inputs of the workload ran.

    Parameters:
        wh_per_1000: watt hours of 1,000 inputs.
        source: whether it was measured, or only estimated from load and rated power.
    """

    wh_per_1000: float
    inputs: int
    source: str
    tool: str


@dataclass(frozen=True)
class Footprint:
    """What some work took, such as all stages together. `co2_grams` is None where the country is not known."""

    kwh: float
    co2_grams: float | None
    country: str | None
    source: str
    tool: str


@dataclass(frozen=True)
class Measurement:
    """Everything measured on one model; with a baseline also that one's measurement and the comparison."""

    model: str
    workload: Workload
    size: Size
    latency: Latency
    quality: Quality | None = None
    baseline: "Measurement | None" = None
    comparison: Comparison | None = None
    energy: Energy | None = None

    def __post_init__(self) -> None:
        if self.quality is not None and not self.quality.scores:  # samples without a score say nothing of quality
            object.__setattr__(self, "quality", None)

    def alone(self) -> "Measurement":
        """The same without baseline and comparison, which a `Report` keeps in places of their own."""
        return replace(self, baseline=None, comparison=None)


@dataclass(frozen=True)
class StageRecord:
    """One stage as it ran: how long, with which settings, and what it did (`facts`: plain JSON values)."""

    name: str
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportRecord:
    """The student in another runtime, timed in turn with the teacher in PyTorch and, where it could be made, the
    teacher in that runtime.

    Parameters:
        folder: where it lies, beside the report.
        difference: largest difference to the student in PyTorch, as a part of the largest output.
        speedup: the teacher's median time in PyTorch / this one.
        quality_difference: to the teacher, on the same samples, with its paired standard error.
        cache: True: a decoder that writes.
        writing: how it reads and writes, where that was asked for, with the teacher's time for a token / its own.
        teacher: the same of the teacher; None: it was not made.
    """

    format: str
    runtime: str
    quantize: str | None
    folder: str
    bytes_on_disk: int
    difference: float
    latency: Latency
    speedup: float
    quality: Quality
    quality_difference: float
    quality_difference_error: float
    cache: bool | None = field(default=None, metadata=UNSAID)
    writing: Decoding | None = field(default=None, metadata=UNSAID)
    writing_speedup: float | None = field(default=None, metadata=UNSAID)
    teacher: ExportedTeacher | None = field(default=None, metadata=UNSAID)


@dataclass(frozen=True)
class DatasetFacts:
    """The data set's name and the number of samples per use, such as `{"train": 1600, "test": 400}`."""

    name: str
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerStructure:
    """What is left of a layer of the teacher; a removed one has 0 heads, 0 neurons and attention `"removed"`."""

    layer: int
    heads: int
    original_heads: int
    neurons: int
    original_neurons: int
    attention: str = "full"
    stack: str = "encoder"


@dataclass(frozen=True)
class Report:
    """One compression run: where it came from, what was done, what was measured.

    Parameters:
        student, teacher, comparison: as `measure(student, baseline=teacher)` gives them.
        created, commit, environment: filled in for this machine and day unless given.
        base_model: the teacher's id on the Hub; its `licence` is inherited by the card.
        loads_with: `"portable"` (stock class, loads anywhere) or `"plugin"` (needs hf_efficient).
        auto_class: what the receiver calls, such as `"AutoModelForSequenceClassification"`.
        exports: the student in other runtimes. lengths: latency against length, shortest first.
        domains: quality on further data. generation: teacher and student while they write.
        serving: times of texts as they come in, of all programs. ladder: beside what is cheap to try.
        processor_class: `"AutoTokenizer"` or `"AutoImageProcessor"`; None if none comes with the model.
        library_name: that in which the receiver uses it: `"transformers"` or `"sentence-transformers"`.

    Raises:
        ConfigError: unknown `loads_with` or `library_name`, a class that transformers cannot have, too many entries.
    """

    student: Measurement
    base_model: str
    teacher: Measurement | None = None
    comparison: Comparison | None = None
    auto_class: str = "AutoModel"
    processor_class: str | None = None
    loads_with: str = "portable"
    licence: str | None = None
    dataset: DatasetFacts | None = None
    stages: tuple[StageRecord, ...] = ()
    structure: tuple[LayerStructure, ...] = ()
    warnings: tuple[str, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    created: str = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).date().isoformat())
    commit: str | None = field(default_factory=package_commit)
    environment: Environment = field(default_factory=Environment.collect)
    schema_version: int = SCHEMA_VERSION
    exports: tuple[ExportRecord, ...] = field(default=(), metadata=LATER)
    lengths: tuple[LengthPoint, ...] = field(default=(), metadata=LATER)
    domains: tuple[Domain, ...] = field(default=(), metadata=UNSAID)
    generation: Generation | None = field(default=None, metadata=UNSAID)
    library_name: str = field(default="transformers", metadata=UNSAID)
    serving: tuple[Serving, ...] = field(default=(), metadata=UNSAID)
    ladder: Ladder | None = field(default=None, metadata=UNSAID)

    def __post_init__(self) -> None:
        if self.loads_with not in LOADS_WITH:
            raise unknown_name("loads_with", self.loads_with, LOADS_WITH)
        if self.library_name not in LIBRARIES:
            raise unknown_name("library_name", self.library_name, LIBRARIES)
        if self.schema_version != SCHEMA_VERSION:
            raise ConfigError(f"schema_version must be {SCHEMA_VERSION}, got {self.schema_version!r}. Leave it out.")
        if not _AUTO_MODEL.fullmatch(self.auto_class):
            raise ConfigError(f"auto_class must be as 'AutoModelForCausalLM', got {shown(self.auto_class)}.")
        if self.processor_class is not None and not _AUTO_PROCESSOR.fullmatch(self.processor_class):
            raise ConfigError(f"processor_class must be as 'AutoTokenizer', got {shown(self.processor_class)}.")
        for name in ("stages", "structure", "warnings", "exports", "lengths", "domains", "serving"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) > MAX_ITEMS:
                raise ConfigError(f"{name} has {len(getattr(self, name)):,} entries, at most {MAX_ITEMS:,} are read.")
        for item in fields(self):
            object.__setattr__(self, item.name, clean(getattr(self, item.name)))

    @property
    def footprint(self) -> Footprint | None:
        """The energy of all stages together; None unless it was tracked in every one of them."""
        parts = [stage.facts.get("energy") for stage in self.stages]
        known = [part for part in parts if isinstance(part, dict) and isinstance(part.get("kwh"), float)]
        if not known or len(known) < len(parts):
            return None
        grams = [part["co2_grams"] for part in known if isinstance(part.get("co2_grams"), float)]
        return Footprint(
            kwh=sum(part["kwh"] for part in known),
            co2_grams=sum(grams) if len(grams) == len(known) else None,
            country=known[0].get("country"),
            source=str(known[0].get("source")),
            tool=str(known[0].get("tool")),
        )

    def to_json(self) -> str:
        """Strict JSON text; a number that is not finite (a diverged model's loss) is written as a string."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The values of `to_json`."""
        return _finite(encode(self))

    @classmethod
    def from_json(cls, text: str, source: str = "this report") -> "Report":
        """Read back `to_json` exactly; CheckpointError, which names `source`, for a damaged or a newer report."""
        try:
            data = parse_json(text, halves=True)  # of a path that is no text: `clean` shows it escaped
        except ValueError as error:
            raise CheckpointError(f"{source} is not valid JSON ({error}). Write it again with `measure`.") from None
        version = data.get("schema_version") if isinstance(data, dict) else None
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise CheckpointError(f"{source} is not a report of hf_efficient: schema_version is {shown(version)}.")
        if version > SCHEMA_VERSION:
            raise CheckpointError(
                f"{source} has schema_version {shown(version)}, this hf_efficient reads up to {SCHEMA_VERSION}. "
                "Run `pip install --upgrade hf-efficient`."
            )
        return decode(cls, data, source)

    def save(self, path: str | Path) -> Path:
        """Write to a `.json` file, or as `report.json` into a folder; the file is complete or not there at all."""
        target = _report_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        return write_atomic(target, self.to_json())


def load_report(path: str | Path) -> Report:
    """Read a `report.json`, or the one in a checkpoint folder.

    Raises:
        CheckpointError: missing, damaged, or written by a newer hf_efficient.
    """
    target = _report_path(path)
    try:
        text = read_text(target)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"No readable report at {target}: {error}. Give a folder with {REPORT_FILE}.") from None
    return Report.from_json(text, source=str(target))


def _report_path(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / REPORT_FILE


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value
