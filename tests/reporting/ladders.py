"""A ladder with made-up numbers, as the movie reviews gave them: ours beside the cheap ways."""

from dataclasses import replace

from hf_efficient.reporting.ladder import Ladder, Rung

RUNGS = (
    Rung("teacher", "teacher", "", 41.5, 0.851, 0.0078, 0.0, 0.0, 90_900_000),
    Rung("student", "student", "", 10.4, 0.846, 0.0079, -0.005, 0.0061, 65_200_000),
    Rung("onnx-int8", "export", "", 5.1, 0.844, 0.0079, -0.007, 0.0063, 17_000_000),
    Rung("tfidf", "baseline", "TF-IDF", 0.41, 0.805, 0.0085, -0.046, 0.0097, 1_234_567, 1.8, "baseline-tfidf"),
    Rung("shallow", "baseline", "the first 2 of 6", 12.2, 0.831, 0.0081, -0.02, 0.0071, 60_100_000, 312.0),
    Rung("int8", "baseline", "the teacher in 8 bits", 19.4, 0.849, 0.0078, -0.002, 0.0022, 23_400_000, 21.3),
)
LADDER = Ladder("accuracy", True, 0.01, 8, 16, 5, 2, RUNGS)


def ladder(**changes) -> Ladder:
    """`LADDER` with rungs changed: `ladder(tfidf={"difference": -0.001})`, or left out: `ladder(tfidf=None)`."""
    rungs = (
        rung if rung.name not in changes else replace(rung, **changes[rung.name])
        for rung in RUNGS
        if changes.get(rung.name, {}) is not None
    )
    return replace(LADDER, rungs=tuple(rungs))
