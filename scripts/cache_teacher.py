#!/usr/bin/env python
"""Keep a teacher's answers to a data set, so that it is paid for once.

    python scripts/cache_teacher.py --teacher out/teacher --dataset bundled:bbc-news --task text-classification \
        --output_dir out/cache
    python scripts/distill.py ... --teacher_cache out/cache

Language models: `--top_k 64 --temperature 2`. `accelerate launch` shares the work out; a killed run goes on.
"""

import sys

from hf_efficient.cli.programs.cache_teacher import read, run
from hf_efficient.errors import HfEfficientError


def main() -> int:
    try:
        cache = run(read(sys.argv[1:]))
    except HfEfficientError as error:
        print(f"cache_teacher.py: {error}", file=sys.stderr)
        return 2
    print(f"{len(cache)} answers in {cache.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
