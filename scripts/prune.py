#!/usr/bin/env python
"""Prune a fine-tuned model without training, or draw what each ratio would cost.

    python scripts/prune.py --model out/teacher --dataset bundled:bbc-news --task text-classification \
        --ratio 0.5 --output_dir out/small
    python scripts/prune.py --model out/teacher --dataset bundled:bbc-news --task text-classification \
        --sweep 0.2 0.4 0.6 0.8 --output_dir out/sweep

`--help` lists the flags.
"""

import sys

from hf_efficient.cli.programs.prune import parse, run
from hf_efficient.errors import HfEfficientError


def main() -> int:
    try:
        run(parse(sys.argv[1:]))
    except HfEfficientError as error:
        print(f"prune.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
