#!/usr/bin/env python
"""Distil a teacher into a smaller student.

    python scripts/distill.py --teacher out/teacher --student_layers 3 --dataset bundled:bbc-news \
        --task text-classification --output_dir out/student --losses '{"ce": 1, "kd": 1, "hidden": 1}'
    accelerate launch scripts/distill.py --config distill.yaml --learning_rate 1e-4

All flags of `transformers.TrainingArguments` work too; `--help` lists them.
"""

import sys

from hf_efficient.cli.programs.distill import read, run
from hf_efficient.errors import HfEfficientError


def main() -> int:
    try:
        run(*read(sys.argv[1:]))
    except HfEfficientError as error:
        print(f"distill.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
