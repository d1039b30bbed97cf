"""Times: of a forward, of teacher and student in the same runtime, and of texts as a server gets them.

report.exports[0].teacher.speedup             # the exported student over the teacher, exported in the same way
report.serving[0].programs[0].student.p95_ms
"""

from dataclasses import dataclass, field

from .language import Decoding

LATER = {"later": True}  # a field that reports of this version may lack, since it came after they were written
UNSAID = LATER | {"unsaid": True}  # and that is not written while it says what is usual
LOADS = ("short", "long", "mixed")  # how texts come in


@dataclass(frozen=True)
class Latency:
    """Times of one forward, over `rounds` rounds after `warmup` uncounted ones. `waited`: the part of the time of its
    threads in which they were ready and had no core; None: unknown."""

    median_ms: float
    p95_ms: float
    min_ms: float
    rounds: int
    warmup: int
    waited: float | None = field(default=None, metadata=UNSAID)


@dataclass(frozen=True)
class ExportedTeacher:
    """The teacher exported and quantised as the student was, timed in turn with it.

    Parameters:
        speedup: its median time / that of the exported student.
        score, standard_error: its main score there; of a program in floats that of the teacher in PyTorch, which it
            gives to rounding.
        writing: how it reads and writes, where that was asked for.
    """

    latency: Latency
    speedup: float
    bytes_on_disk: int
    score: float
    standard_error: float
    writing: Decoding | None = field(default=None, metadata=UNSAID)


@dataclass(frozen=True)
class ServedProgram:
    """Teacher and student in one runtime while the same texts come in.

    Parameters:
        program: the folder of the export; `"pytorch"`: as they are.
        teacher: None where it was not exported.
        teacher_per_second, student_per_second: texts.
        speedup: median over the rounds of the teacher's time / the student's for the same texts.
        over_pytorch: the same over the teacher in PyTorch.
    """

    program: str
    student: Latency
    student_per_second: float
    over_pytorch: float
    teacher: Latency | None = None
    teacher_per_second: float | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class Serving:
    """Texts of the test set as they come in (`LOADS`), all programs in turn.

    Parameters:
        load: `"short"`, `"long"` or `"mixed"`.
        batch_size: texts at once. tokens: of a text, on average, as the teacher reads it.
    """

    load: str
    batch_size: int
    tokens: float
    programs: tuple[ServedProgram, ...]


@dataclass(frozen=True)
class LengthPoint:
    """Median times of one forward of the workload's batch at another length; None: the teacher does not take it."""

    sequence_length: int
    student_ms: float
    teacher_ms: float | None
