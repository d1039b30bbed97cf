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
from ..runtimes.formats import FORMATS, NEAR, QUANTIZE, check_format, check_runtime, folder_name
from .base import Run, Stage
from .settings import flag, number, one_of

if TYPE_CHECKING:
    from ..data.preparation import PreparedData
    from ..reporting.schema import Report, StageRecord

TEST_ROWS = ((0, 2), (2, 3), (3, 8))  # of the test rows: it is compared with two, one and five at a time


def compared_batches(prepared: "PreparedData") -> list[Any]:
    """Of the test rows, those on which what was made is compared with the model."""
    rows = [[prepared.test[i] for i in range(*cut) if i < len(prepared.test)] for cut in TEST_ROWS]
    return [prepared.collator(some) for some in rows if some]


@dataclass(frozen=True)
class ExportStage(Stage):
    """`export(model, format, quantize=...)`.

    - export: {format: onnx}
    - export: {format: onnx, quantize: int8}
    - export: {format: onnx, cache: true}                             # a decoder that writes
    - export: {format: onnx, quantize: int8, min_agreement: 0.98}     # else the stage fails
    - export: {format: onnx, quantize: int8, max_loss: 0.5}           # else the run fails, and keeps what it made

    `max_loss` is what the export may lose to the teacher in the main score of the task: points of a percentage, else
    in units of the score.
    """

    followers = ("export",)
    reason = "it is made of the finished model"

    format: str = one_of("onnx", FORMATS)
    quantize: str | None = one_of(None, QUANTIZE, optional=True)
    min_agreement: float | None = number(None, 0, 1, optional=True)
    max_loss: float | None = number(None, 0, 1e6, optional=True)
    cache: bool = flag(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_format(self.format, self.quantize, self.cache)

    def to_dict(self) -> dict[str, Any]:
        """What came later only where it is given, so that runs of older versions go on."""
        later = ("min_agreement", "max_loss", "cache")
        given = super().to_dict().items()
        return {name: value for name, value in given if name not in later or not (value is None or value is False)}

    @property
    def beside(self) -> str:
        return folder_name(self.format, self.quantize, self.cache)

    def check(self, path: str, run: Run, config: Any, before: Sequence[Stage]) -> Any:
        check_runtime(self.format)
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
        batches = compared_batches(run.data(config=model.config))
        remove_own(folder)  # of a run that was stopped
        exported = export(
            model,
            self.format,
            folder,
            inputs=batches,
            quantize=self.quantize,
            cache=self.cache,
            min_agreement=self.min_agreement,
            tokenizer=run.processor,
        )
        if run.processor is not None:
            run.processor_for(model).save_pretrained(folder)
        facts = dataclasses.asdict(exported)
        del facts["folder"], facts["checked"]
        return facts

    def note(self, record: "StageRecord") -> tuple[str, ...]:
        """An export that predicts something else is no silent success."""
        same = record.facts.get("same_prediction", 1.0)
        if same >= NEAR:
            return ()
        return (
            f"The export {self.beside} predicts the same as the model itself in only {same:.0%} of the outputs that "
            "were compared: see its own quality before you use it.",
        )

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
