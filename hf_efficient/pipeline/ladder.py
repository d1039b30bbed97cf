"""What a user would try first, made beside the result and measured with it: the ladder of a report.

    made = make_baselines(run, space, student_folder, announce)
    report = replace(report, ladder=measured_ladder(run, student_folder, made, report))

Each lies in a folder of the run, `baseline-tfidf`, and is made once, as a stage is. All read the same texts with their
own tokenizers, and the time is that from text to answer.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reporting.ladder import Ladder, Rung
from ..reporting.schema import Report, StageRecord
from ..training.ranks import alone, on_main
from .workspace import Workspace

if TYPE_CHECKING:
    from ..baselines.base import Reader
    from .run import Run

Made = dict[str, tuple[Path, StageRecord]]
TEXTS = 16  # test rows that are timed, or one batch where that is larger
ROUNDS = 5  # at most so often, of each
USUAL_LOSS = 1.0  # points that may be lost, where the recipe requires nothing


def folder_of(name: str) -> str:
    """Of a baseline, in the folder of a run."""
    return f"baseline-{name}"


def check_ladder(run: "Run") -> None:
    """What the baselines of the recipe refuse, before any long work."""
    from ..baselines.table import BASELINES

    for name in run.recipe.baselines:
        BASELINES[name].check(run)


def make_baselines(run: "Run", space: Workspace, student: Path, announce: Callable[[str], None]) -> Made:
    """Those of the recipe, each in its folder; a finished one is not made again."""
    from ..baselines.table import BASELINES

    made: Made = {}
    for name in run.recipe.baselines:
        announce(f"baseline {name} ...")
        baseline = BASELINES[name]
        work: Callable[[Path], Any] = partial(baseline.make, run, student)
        if not baseline.is_shared:
            work = partial(_by_main, work)
        made[name] = space.stage(folder_of(name), {}, work)
        announce(f"baseline {name} done in {made[name][1].seconds:.0f} s")
    return made


def _by_main(work: Callable[[Path], Any], target: Path) -> Any:
    return on_main(lambda: work(target)) or {}


def measured_ladder(run: "Run", student: Path, made: Made, report: Report) -> Ladder | None:
    """All of them with the teacher, the result and its exports; None where the recipe asks for no baseline."""
    from ..baselines.base import evaluate_reader, time_readers
    from ..measurement.quality import compare_quality

    if not made:
        return None

    readers = _readers(run, student, made, report)
    texts, labels = run.read_texts("test"), run.data().test["labels"]
    batch, rounds = run.recipe.measure.batch_size, min(run.recipe.measure.repeats, ROUNDS)
    timed = (texts * (1 + batch // len(texts)))[: max(TEXTS // batch, 1) * batch]
    batches = [timed[start : start + batch] for start in range(0, len(timed), batch)]
    with alone():
        evaluations = {name: evaluate_reader(reader, texts, labels) for name, reader in readers.items()}
        times, threads = time_readers(readers, batches, rounds)
    rungs = []
    for name, reader in readers.items():
        main = evaluations[name].quality.main
        change = compare_quality(evaluations["teacher"], evaluations[name])
        record = made[name][1] if name in made else None
        rungs.append(
            Rung(
                name=name,
                kind=name if name in ("teacher", "student") else "baseline" if record else "export",
                about=str(record.facts.get("about", "")) if record else "",
                median_ms=times[name],
                score=main.value,
                standard_error=main.standard_error,
                difference=change.difference,
                difference_error=change.standard_error,
                weight_bytes=reader.weight_bytes,
                seconds=None if record is None else record.seconds,
                folder=None if record is None else folder_of(name),
            )
        )
    required = run.recipe.require.quality_loss if run.recipe.require is not None else None
    return Ladder(
        score=main.name,
        higher_is_better=main.higher_is_better,
        allowed_loss=(USUAL_LOSS if required is None else required) / 100,
        batch_size=batch,
        texts=len(timed),
        rounds=rounds,
        threads=threads,
        rungs=tuple(rungs),
    )


def _readers(run: "Run", student: Path, made: Made, report: Report) -> "dict[str, Reader]":
    """By name, in the order of the ladder: the teacher, the result, its exports, and the baselines."""
    from ..baselines.base import reader_of
    from ..baselines.table import BASELINES
    from ..measurement.size import count_weight_bytes
    from ..runtimes.runtime import Runtime

    teacher, small, reading = run.load(run.teacher_folder), run.load(student), run.read_as(student)
    readers: dict[str, Reader] = {
        "teacher": reader_of(run, teacher, count_weight_bytes(teacher)),
        "student": reader_of(reading, small, count_weight_bytes(small)),
    }
    for each in report.exports:
        stage = next(name for name, one in run.recipe.folders.items() if one.beside == each.folder)
        program = Runtime(small, each.format, run.folder / stage / each.folder)
        readers[each.folder] = reader_of(reading, small, each.bytes_on_disk, program)
    return readers | {name: BASELINES[name].reader(run, folder) for name, (folder, _) in made.items()}
