"""Opens saved models in a fresh process and reports what happened.

    python -m tests.pruning.reload_driver job.json out.json

A job is a list of {"name", "folder", "auto", "stock"}; a folder also holds `inputs.safetensors` and the expected
`logits.safetensors`. The class named by `stock` tries to open it too.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from tests.families import real_logits


def open_all(jobs: list[dict]) -> dict[str, dict]:
    return {job["name"]: _open(job) for job in jobs}


def _open(job: dict) -> dict:
    folder = Path(job["folder"])
    model, info = getattr(transformers, job["auto"]).from_pretrained(folder, output_loading_info=True)
    model.eval()
    expected = load_file(folder / "logits.safetensors")["logits"]
    inputs = {key: value.clone() for key, value in load_file(folder / "inputs.safetensors").items()}
    for parameter in model.parameters():  # a file's tensors lie where they lie, and rounding depends on the alignment
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        found = real_logits(model, inputs)
    return {
        "class": type(model).__name__,
        "module": type(model).__module__,
        "equal": torch.equal(found, expected),
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(map(str, info["mismatched_keys"])),
        "stock": _try_stock(folder, job["stock"]),
    }


def _try_stock(folder: Path, name: str) -> str:
    """`ok`, or the error of the stock class."""
    try:
        getattr(transformers, name).from_pretrained(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def main(jobs: str, out: str) -> None:
    torch.set_num_threads(1)
    Path(out).write_text(json.dumps(open_all(json.loads(Path(jobs).read_text()))))


if __name__ == "__main__":
    main(*sys.argv[1:])
