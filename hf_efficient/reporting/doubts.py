"""What a reader must know where numbers mean less than they seem to: a busy machine, a teacher that guesses."""

from .schema import Measurement

BUSY = 0.1  # of the time that a thread wanted to run


def describe_waiting(*measurements: Measurement | None) -> str:
    """An empty text where all of them had the machine for themselves, or nothing is known of it."""
    shares = [each.latency.waited for each in measurements if each is not None and each.latency.waited is not None]
    if not shares or max(shares) < BUSY:
        return ""
    return (
        f"The machine was busy: while it was timed, this process waited for a core {max(shares):.0%} of the time. "
        "Latency and speed-up are not those of a quiet machine; measure again on one."
    )


def describe_guessing(teacher: Measurement | None) -> str:
    """An empty text where the teacher is right more often than by the most frequent class, by two standard errors."""
    quality = None if teacher is None else teacher.quality
    if quality is None or quality.largest_class is None:
        return ""
    score, guessed = quality.main, quality.largest_class
    if score.value > guessed + 2 * score.standard_error:
        return ""
    return (
        f"The teacher is right in {score.value:.1%} ± {score.standard_error:.1%} of the test rows, and the most "
        f"frequent class alone in {guessed:.1%}: it has learned next to nothing, so what the student keeps of it says "
        "nothing. Train it longer (`teacher`), or on more rows."
    )
