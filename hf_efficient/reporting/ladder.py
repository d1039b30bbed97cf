"""The result beside the cheap ways that a user would try first, all of them on the same test rows.

report.ladder.best                       # the rung that a user should take, by the rule of `Ladder`
report.ladder.rungs[0].median_ms
"""

from dataclasses import dataclass, field

TIE = 0.05  # of the time: what is no slower than that is as fast
ROUNDING = 1e-9  # the difference of two fractions may be that far off


@dataclass(frozen=True)
class Rung:
    """One way from a text to its class, measured as all others of its ladder.

    Parameters:
        name: `teacher`, `student`, one of its exports (`onnx-int8`), or a baseline.
        kind: `teacher`, `student`, `export` or `baseline`.
        about: what it is, in words.
        median_ms: from the texts of one batch to their scores, tokenizer included.
        difference: to the teacher in the main score, on the same samples, with its paired standard error.
        weight_bytes: of what must be kept to run it, but for tokenizers and lists of words.
        seconds: what making it took, beyond the teacher; None: not told here.
        folder: where the run keeps it.
    """

    name: str
    kind: str
    about: str
    median_ms: float
    score: float
    standard_error: float
    difference: float
    difference_error: float
    weight_bytes: int
    seconds: float | None = None
    folder: str | None = None


@dataclass(frozen=True)
class Ladder:
    """All of them. Which one to take: the fastest that loses at most `allowed_loss` of the main score to the teacher;
    of those that are as fast within 5 %, the smallest.

    Parameters:
        score: the name of the main score.
        allowed_loss: in the units of the score: 0.01 is one point of accuracy.
        batch_size, texts: so many test rows were timed, in batches of that size. rounds: so often.
    """

    score: str
    higher_is_better: bool
    allowed_loss: float
    batch_size: int
    texts: int
    rounds: int
    threads: int
    rungs: tuple[Rung, ...] = field(default=())

    def loss(self, rung: Rung) -> float:
        """What it loses to the teacher, in the units of the score."""
        return -rung.difference if self.higher_is_better else rung.difference

    @property
    def best(self) -> Rung | None:
        """The one to take; None where none is known to be good enough."""
        good = [rung for rung in self.rungs if self.loss(rung) <= self.allowed_loss + ROUNDING and rung.median_ms > 0]
        fastest = min((rung.median_ms for rung in good), default=0.0)
        tied = [rung for rung in good if rung.median_ms <= (1 + TIE) * fastest]
        return min(tied, key=lambda rung: (rung.weight_bytes, rung.median_ms), default=None)
