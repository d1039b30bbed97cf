"""A tiny recipe run by the processes of a group, for test_ranks; one of them may fail on purpose.

python -m tests.pipeline.ranks_driver recipe.yaml folder [fault]
"""

import json
import os
import sys
from pathlib import Path

import torch

from hf_efficient import HfEfficientError, Recipe, compress
from hf_efficient.distillation.trainer import DistillationTrainer
from hf_efficient.pipeline import verify
from hf_efficient.reporting import plots
from hf_efficient.training import ranks

RANK = int(os.environ.get("RANK", "0"))


def fail(fault: str) -> None:
    """`step`: in the middle of a training, where the other process waits in an exchange of gradients; `disk`: where
    the first one alone writes."""
    if fault == "step" and RANK == 1:
        own = DistillationTrainer.compute_loss

        def broken(self, *args, **kwargs):
            if self.state.global_step == 2:
                raise ValueError("this row is broken")
            return own(self, *args, **kwargs)

        DistillationTrainer.compute_loss = broken
    if fault == "disk" and RANK == 0:
        from hf_efficient.pipeline.run import Run

        def full(self, model, folder):
            raise OSError(28, "No space left on device")

        Run._write = full


def main(recipe: str, folder: str, fault: str = "") -> None:
    torch.set_num_threads(1)
    verify.check_reload = lambda *_: None  # other tests see to these
    plots.save_plots = lambda *_: []
    fail(fault)
    answer = {}
    try:
        report = compress(Recipe.from_yaml(recipe), output_dir=folder)
        answer["report"] = report.to_dict()
    except HfEfficientError as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    except Exception as error:
        answer["error"] = f"its own {type(error).__name__}: {error}"
    Path(f"{folder}.{RANK}.json").write_text(json.dumps(answer))
    if not fault:
        ranks.leave()
    os._exit(0)  # without the exchange that a broken group would wait in


if __name__ == "__main__":
    main(*sys.argv[1:])
