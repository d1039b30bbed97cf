"""Proof that a saved model is the model that was made: equal output in a process that knows nothing of this one.

    python -m hf_efficient.pipeline.verify out/bbc-news/model AutoModelForSequenceClassification

The digest is that of the output for a fixed random input, computed on one thread, so it is the same on every run on
one machine.
"""

import hashlib
import sys
from pathlib import Path

from ..errors import CheckpointError
from ..io.process import run_module

LIMIT = 3600.0  # seconds for loading and one forward: what takes longer hangs
LENGTH = 192  # tokens, where the model takes so many: longer than usual windows, so that they count


def output_digest(model) -> str:
    """sha256 of the first output tensor for a fixed input."""
    import torch

    from ..models.inputs import dummy_inputs
    from ..models.modes import evaluating, using_threads
    from ..models.registry import token_limit

    length = min(LENGTH, token_limit(model.config) or LENGTH)
    with evaluating(model), using_threads(1), torch.no_grad():
        output = model(**dummy_inputs(model, 2, length))[0]
    return hashlib.sha256(output.float().cpu().contiguous().numpy().tobytes()).hexdigest()


def check_reload(
    folder: str | Path, auto_class: str, expected: str, trust_remote_code: bool = False, limit: float = LIMIT
) -> None:
    """CheckpointError unless a fresh process loads `folder` within `limit` seconds and computes the same digest."""
    words = (str(folder), auto_class, *["trust"] * trust_remote_code)
    try:
        result = run_module("hf_efficient.pipeline.verify", *words, timeout=limit)
    except TimeoutError:
        raise CheckpointError(
            f"The model in {folder} does not load in a fresh process within {limit:g} s. Give the same command again "
            "when the machine has less to do."
        ) from None
    if result.returncode != 0:
        raise CheckpointError(
            f"The model in {folder} does not load in a fresh process: {result.stderr.strip()[-500:]}"
        )
    if result.stdout.split()[-1:] != [expected]:
        raise CheckpointError(f"The model in {folder} gives another output in a fresh process than in this one.")


def main(folder: str, auto_class: str, trust: str = "") -> None:
    import hf_efficient  # noqa: F401  (registers the efficient classes)

    from ..models.loading import load_model

    print(output_digest(load_model(auto_class, folder, trust_remote_code=trust == "trust")))


if __name__ == "__main__":
    main(*sys.argv[1:])
