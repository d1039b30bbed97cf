"""A model whose code came with it, in a process that knows nothing of it.

    python -m tests.models.derive.own_driver CACHE make FOLDER OUT      # of the code in FOLDER: OUT/head, ...
    python -m tests.models.derive.own_driver CACHE load OUT AGAIN       # prints what they are; pruned again in AGAIN

CACHE is where transformers keeps its copy of the code.
"""

import json
import sys
from pathlib import Path

import torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from hf_efficient import AttentionConfig, PruningConfig, convert_attention, prune

BY_SIZE = {"importance": "magnitude", "layer_importance": "magnitude", "round_to": 1, "reconstruct": False}
IDS = torch.arange(3, 21).view(2, 9)
TRUST = {"trust_remote_code": True}


def make(folder: str, out: str) -> None:
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder, **TRUST), **TRUST)
    _save(convert_attention(model, AttentionConfig("local", window=2)), Path(out, "converted"))
    for part in ("head", "neuron", "layer"):
        _save(prune(model, PruningConfig(ratio=0.1, granularity=(part,), **BY_SIZE)), Path(out, part))


def load(folder: str, out: str) -> None:
    loaded = {}
    for path in sorted(Path(folder).iterdir()):
        model = AutoModel.from_pretrained(path, **TRUST)
        expected = load_file(path / "expected.safetensors")["expected"]
        small = prune(model, PruningConfig(ratio=0.03, granularity=("neuron",), **BY_SIZE))
        _save(small, Path(out, path.name))
        is_smaller = small.num_parameters() < model.num_parameters()
        loaded[path.name] = [type(model).__name__, torch.equal(_output(model), expected), is_smaller]
    print(json.dumps(loaded))


def _save(model, folder: Path) -> None:
    model.save_pretrained(folder)
    save_file({"input_ids": IDS, "expected": _output(model)}, folder / "expected.safetensors")  # for tests.fresh
    (folder / "auto.txt").write_text("AutoModel")


@torch.no_grad()
def _output(model) -> torch.Tensor:
    for parameter in model.parameters():  # a file's tensors lie where they lie, and rounding depends on the alignment
        parameter.data = parameter.data.clone()
    return model.eval()(input_ids=IDS)[0].contiguous()


if __name__ == "__main__":
    transformers.dynamic_module_utils.HF_MODULES_CACHE, action, *paths = sys.argv[1:]
    torch.manual_seed(0)
    {"make": make, "load": load}[action](*paths)
