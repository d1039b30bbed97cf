"""Where measured tables are kept: one JSON file each, named by a hash of all that decides times.

The folder is `hf_efficient/latency` in the Hugging Face cache, or in `HF_EFFICIENT_CACHE` if that is set; it may be
deleted at any time. A table of another machine, another size or another version has another name; a file that cannot
be read is measured anew.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import PreTrainedModel
from transformers.utils import logging

from ...io.disk import write_atomic
from ...io.environment import Environment
from ...io.json import read_json
from .latency_table import LatencyTable

VERSION = 1  # of how a table is measured
_NO_SIZES = ("_name_or_path", "architectures", "transformers_version", "auto_map", "id2label", "label2id")

logger = logging.get_logger(__name__)


def folder() -> Path:
    """Where tables are."""
    chosen = os.environ.get("HF_EFFICIENT_CACHE")
    return (Path(chosen) if chosen else Path(constants.HF_HOME) / "hf_efficient") / "latency"


def make_key(model: PreTrainedModel, batch_size: int, sequence_length: int, threads: int) -> str:
    """A hash of the model's sizes, its inputs, the device and its threads, the machine and the versions."""
    sizes = {name: value for name, value in model.config.to_dict().items() if name not in _NO_SIZES}
    device = model.device
    facts = {
        "version": VERSION,
        "class": type(model).__name__,
        "config": sizes,
        "labels": len(model.config.id2label or ()),
        "attention": model.config._attn_implementation,
        "inputs": [batch_size, sequence_length],
        "dtype": str(model.dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": threads,
        "environment": asdict(Environment.collect()),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def load(key: str) -> LatencyTable | None:
    """The table of that key; None if there is none, or none that can be read."""
    path = folder() / f"{key}.json"
    try:
        return LatencyTable.from_dict(read_json(path)) if path.exists() else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        logger.warning(f"The latency table {path} cannot be read ({error}) and is measured again.")
        return None


def save(key: str, table: LatencyTable) -> None:
    """Write it by a temporary name. Where that is not allowed, it is measured again next time."""
    path = folder() / f"{key}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(table.to_dict(), indent=1) + "\n")
    except OSError as error:
        logger.warning(f"The latency table cannot be kept ({error}). Set HF_EFFICIENT_CACHE to a folder of your own.")
