"""Coverage-guided fuzzing of everything that reads files of strangers: recipes, configs, plans, reports, data.

    pip install atheris
    python scripts/fuzz.py recipe --seconds 120
    python scripts/fuzz.py report --seconds 120 --corpus out/fuzz/report

A fault is any error but an HfEfficientError, or what was read not coming back equal. It is printed with the text that
caused it, and the fuzzer stops. What is tried, and what must hold, is in tests/robustness: the same documents, changes
and checks as in the tests, only that atheris makes the choices, guided by which lines of ours they reach.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    arguments = read_arguments()
    try:
        import atheris
    except ImportError:
        sys.exit("The fuzzer needs atheris: pip install atheris (CPython 3.11 to 3.13 on Linux).")

    with atheris.instrument_imports(include=["hf_efficient"]):
        from tests.robustness.mutations import mutated, scrambled
        from tests.robustness.targets import TARGETS
    if arguments.target not in TARGETS:
        sys.exit(f"Unknown target {arguments.target!r}. Known: {', '.join(TARGETS)}.")
    target = TARGETS[arguments.target]
    documents = target.documents()

    def text_of(data: bytes) -> str:
        """The first byte decides: a document after some changes, or the bytes as they are."""
        choices = atheris.FuzzedDataProvider(data)
        if choices.ConsumeIntInRange(0, 7) == 0:
            return choices.ConsumeUnicodeNoSurrogates(1 << 14)

        def pick(count: int) -> int:
            return choices.ConsumeIntInRange(0, count - 1)

        text = target.write(mutated(documents[pick(len(documents))], pick))
        return scrambled(text, pick) if pick(3) == 0 else text

    def try_one(data: bytes) -> None:
        text = text_of(data)
        try:
            target.read(text)
        except Exception:
            print(f"---- {arguments.target} ----\n{text[:4000]}", file=sys.stderr)
            raise

    options = [f"-max_total_time={arguments.seconds}", "-max_len=512", "-timeout=20", f"-seed={arguments.seed}"]
    if arguments.corpus:
        Path(arguments.corpus).mkdir(parents=True, exist_ok=True)
        options.append(arguments.corpus)
    atheris.Setup([sys.argv[0], *options], try_one)
    atheris.Fuzz()


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", help="one of TARGETS in tests/robustness/targets.py, such as recipe, config or csv")
    parser.add_argument("--seconds", type=int, default=60, help="how long, in seconds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", help="a folder in which what reached new lines is kept for the next time")
    return parser.parse_args()


if __name__ == "__main__":
    main()
