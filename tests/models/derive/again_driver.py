"""Loads saved models with their Auto classes and says what came; for a process of its own.

    python -m tests.models.derive.again_driver FOLDER

The subfolders of FOLDER hold a model, `auto.txt` and `expected.safetensors` (see `tests.processes`).
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file


def load(folder: Path) -> dict:
    tensors = load_file(folder / "expected.safetensors")
    expected = tensors.pop("expected")
    model = getattr(transformers, (folder / "auto.txt").read_text()).from_pretrained(folder).eval()
    for parameter in model.parameters():  # a file's tensors lie where they lie, and rounding depends on the alignment
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        equal = torch.equal(model(**tensors)[0], expected)
    return {"class": type(model).__name__, "equal": equal, "parameters": model.num_parameters()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({path.name: load(path) for path in sorted(Path(sys.argv[1]).iterdir())}))
