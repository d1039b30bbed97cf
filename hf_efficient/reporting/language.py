"""What is measured of language models beside one forward: other texts, decoding, and what they write.

report.domains[0].dataset, report.domains[0].student.main
report.generation.student.token_ms, report.generation.samples[0].student
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Domain:
    """The main score on texts of another kind than the run's own; `difference` is student - teacher, paired.

    `agreement` is None where the two spell texts in other tokens, as `Generation.acceptance` is.
    """

    dataset: str
    samples: int
    score: str
    teacher: float
    student: float
    difference: float
    standard_error: float
    agreement: float | None


@dataclass(frozen=True)
class Decoding:
    """Reading a prompt, then one token after the other: median milliseconds, and bytes of the full cache."""

    prefill_ms: float
    token_ms: float
    cache_bytes: int


@dataclass(frozen=True)
class Sample:
    """What both go on with after a prompt, always taking the likeliest token."""

    prompt: str
    teacher: str
    student: str


@dataclass(frozen=True)
class Generation:
    """Teacher and student while they write, in turn.

    Parameters:
        acceptance: of the tokens that the teacher writes in the samples, the part that the student would have written
            there: so much of its drafts an assisted teacher keeps.
    """

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    teacher: Decoding
    student: Decoding
    acceptance: float | None
    samples: tuple[Sample, ...] = ()
