"""The teacher in the runtimes of the student's exports, so that both can be compared there.

    folder, note = exported_teacher(run, teacher, facts)           # out/.../teacher-exports/onnx-int8, ""

What is made stays in the run's folder, so a run that was killed goes on with it; it is no part of the result.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from ..io.disk import check_inside, finish_folder, inside, kept_folder, remove_own
from ..runtimes.formats import folder_name
from ..stages.export import calibration_batches, compared_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .run import Run

FOLDER = "teacher-exports"


def exported_teacher(run: "Run", teacher: "PreTrainedModel", facts: dict[str, Any]) -> tuple[Path | None, str]:
    """The folder of the teacher's program, made as the student's was; None, and a note for the report, where it
    cannot be made.

    Parameters:
        teacher: reads the tokens of `run`. facts: of the student's export: `format`, `quantize`, `cache`.
    """
    from ..runtimes.export import export

    name = folder_name(facts["format"], facts["quantize"], bool(facts.get("cache")))
    target = inside(inside(run.folder, FOLDER), name)
    check_inside(target)
    if target.is_dir():
        return target, ""
    prepared, samples = run.data(config=teacher.config), facts.get("calibration_samples")
    rows = calibration_batches(prepared, samples) if samples and facts["quantize"] else None
    partial = kept_folder(target)
    remove_own(partial)  # of a run that was stopped
    try:
        export(
            teacher,
            facts["format"],
            partial / name,
            inputs=compared_batches(prepared),
            quantize=facts["quantize"],
            cache=bool(facts.get("cache")),
            tokenizer=run.processor,
            calibration=rows,
        )
        finish_folder(partial / name, target)
    except UnsupportedModelError as error:
        return None, (
            f"How fast the teacher would be as {name} is not known, so the speed-up of that export is told over the "
            f"teacher in PyTorch alone: {error}"
        )
    finally:
        remove_own(partial)
    return target, ""
