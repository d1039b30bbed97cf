"""The stage that writes what the stages before it made for another runtime; the model itself stays as it is.

- export: {format: onnx, quantize: int8}
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from ..io.disk import remove_own
from ..runtimes.formats import FORMATS, NEAR, check_format, check_quantizer, check_runtime, folder_name
from ..runtimes.rounding import AUTO, QUANTIZE
from .base import Run, Stage
from .settings import flag, integer, number, one_of

if TYPE_CHECKING:
    from ..data.preparation import PreparedData
    from ..reporting.schema import Report, StageRecord

CALIBRATED = 128  # training rows on which ranges of activations are found
JUDGED = 512  # other training rows, on which `quantize: auto` chooses
ALLOWED = 0.5  # points of a percentage, else units of the score, that it may lose
TEST_ROWS = ((0, 2), (2, 3), (3, 8))  # of the test rows: it is compared with two, one and five at a time


def compared_batches(prepared: "PreparedData") -> list[Any]:
    """Of the test rows, those on which what was made is compared with the model."""
    rows = [[prepared.test[i] for i in range(*cut) if i < len(prepared.test)] for cut in TEST_ROWS]
    return [prepared.collator(some) for some in rows if some]


def calibration_batches(prepared: "PreparedData", count: int) -> list[Any]:
    """Training rows from all over, each by itself: padding has no ranges to be found."""
    return [prepared.collator([prepared.train[i]]) for i in _spread(len(prepared.train), count)]


def judged_rows(prepared: "PreparedData", calibrated: int) -> list[Any]:
    """Other training rows, as far as there are any."""
    total, used = len(prepared.train), set(_spread(len(prepared.train), calibrated))
    others = [row for row in range(total) if row not in used] or list(range(total))
    return [prepared.train[others[i]] for i in _spread(len(others), JUDGED)]


def _spread(total: int, count: int) -> list[int]:
    return [number * total // min(count, total) for number in range(min(count, total))]


@dataclass(frozen=True)
class ExportStage(Stage):
    """`export(model, format, quantize=...)`.

    - export: {format: onnx}
    - export: {format: onnx, quantize: int8}
    - export: {format: openvino, quantize: auto}                      # the fastest of those that lose little
    - export: {format: onnx, cache: true}                             # a decoder that writes
    - export: {format: onnx, quantize: int8, min_agreement: 0.98}     # else the stage fails
    - export: {format: onnx, quantize: int8, max_loss: 0.5}           # else the run fails, and keeps what it made

    `max_loss` is what the export may lose to the teacher in the main score of the task: points of a percentage, else
    in units of the score. With `quantize: auto` it is also what 8 bits may lose to the student itself, on training
    rows; 0.5 where nothing is said. `calibration_samples`: training rows on which ranges of activations are found.
    """

    followers = ("export",)
    reason = "it is made of the finished model"

    format: str = one_of("onnx", FORMATS)
    quantize: str | None = one_of(None, QUANTIZE, optional=True)
    min_agreement: float | None = number(None, 0, 1, optional=True)
    max_loss: float | None = number(None, 0, 1e6, optional=True)
    cache: bool = flag(False)
    calibration_samples: int = integer(CALIBRATED, 1, 100_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_format(self.format, self.quantize, self.cache)

    def to_dict(self) -> dict[str, Any]:
        """What came later only where it is given, so that runs of older versions go on."""
        later = {"min_agreement": None, "max_loss": None, "cache": False, "calibration_samples": CALIBRATED}
        given = super().to_dict().items()
        return {name: value for name, value in given if name not in later or value != later[name]}

    @property
    def beside(self) -> str:
        return folder_name(self.format, self.quantize, self.cache)

    def check(self, path: str, run: Run, config: Any, before: Sequence[Stage]) -> Any:
        check_runtime(self.format)
        check_quantizer(self.format, self.quantize)
        if config is not None:
            from ..runtimes.rows import check_rows

            check_rows(config, lambda: run.skeleton(config))
            if self.cache:
                from ..runtimes.decoder import check_decoder

                check_decoder(run.skeleton(config))
        return config

    def run(self, run: Run, source: Path, target: Path) -> dict[str, Any]:
        """Into a folder of its own, with what reads the inputs."""
        from ..runtimes.export import export

        model, folder = run.load(source), target / self.beside
        prepared = run.data(config=model.config)
        calibrated = self.quantize in (AUTO, *FORMATS[self.format].calibrated)
        rows = calibration_batches(prepared, self.calibration_samples) if calibrated else None
        compared = compared_batches(prepared)

        def make(way: str | None, place: Path) -> Any:
            return export(
                model,
                self.format,
                place,
                inputs=compared,
                quantize=way,
                cache=self.cache,
                min_agreement=self.min_agreement,
                tokenizer=run.processor,
                calibration=rows,
            )

        remove_own(folder)  # of a run that was stopped
        if self.quantize == AUTO:
            exported, tried = self._choose(run, model, prepared, make, folder)
        else:
            exported, tried = make(self.quantize, folder), []
        if run.processor is not None:
            run.processor_for(model).save_pretrained(folder)
        facts = dataclasses.asdict(exported)
        del facts["folder"], facts["checked"]
        more = {"calibration_samples": self.calibration_samples} if calibrated else {}
        return facts | more | ({"tried": [dataclasses.asdict(each) for each in tried]} if tried else {})

    def _choose(
        self, run: Run, model: Any, prepared: "PreparedData", make: Any, folder: Path
    ) -> tuple[Any, list[Any]]:
        from ..models.registry import token_limit
        from ..runtimes.choice import ROUNDS, choose
        from ..runtimes.runtime import Reader, Work

        measure, limit = run.recipe.measure, token_limit(model.config) or 512
        length = min(measure.sequence_length or run.recipe.data.max_length or 512, limit)
        work = Work(run.recipe.task, measure.batch_size, length, min(measure.repeats, ROUNDS), run.pooling)
        reader = Reader(model, judged_rows(prepared, self.calibration_samples), prepared.collator)
        return choose(self.format, make, folder, reader, work, ALLOWED if self.max_loss is None else self.max_loss)

    def note(self, record: "StageRecord") -> tuple[str, ...]:
        """An export that predicts something else is no silent success, and 8 bits that ruin a model are told."""
        facts, notes = record.facts, []
        same = facts.get("same_prediction", 1.0)
        if same < NEAR:
            notes.append(
                f"The export {self.beside} predicts the same as the model itself in only {same:.0%} of the outputs "
                "that were compared: see its own quality before you use it."
            )
        ruined = [each for each in facts.get("tried", []) if each["milliseconds"] is None]
        if ruined:
            told = "; ".join(
                f"{each['quantize']} {each['reason'] or format(each['loss'], '.3g') + ' lost'}" for each in ruined
            )
            allowed = ALLOWED if self.max_loss is None else self.max_loss
            notes.append(
                f"The export {self.beside} is {facts['quantize'] or 'in floats'}: not all ways to 8 bits lose at most "
                f"{allowed:g} to the student on training rows ({told})."
            )
        return tuple(notes)

    def check_report(self, report: "Report", after: Sequence[Stage] = ()) -> None:
        from ..reporting.exported import format_export_change
        from ..reporting.numbers import scale_of

        same = (stage for stage in after if isinstance(stage, ExportStage) and stage.beside == self.beside)
        if self.max_loss is None or any(stage.max_loss is not None for stage in same):  # the last one counts
            return
        for record in report.exports:
            main = record.quality.main
            loss = scale_of(main.name) * record.quality_difference * (-1 if main.higher_is_better else 1)
            if record.folder == self.beside and not loss <= self.max_loss:  # not a number is too much as well
                raise UnsupportedModelError(
                    f"The export {record.folder} changes {main.name} by {format_export_change(record)}, and max_loss "
                    f"is {self.max_loss:g}. The result is there all the same, with its report. Allow more, or prune "
                    "and quantise less."
                )
