"""Time per token and bytes of the cache while a model decodes, against the tokens that are in the cache already.

    python benchmarks/decode.py --output benchmarks/results/decode_cpu.json
    python benchmarks/decode.py --contexts 512 2048 --methods full linear --rounds 3

A Llama of 4 layers, 8 heads of dimension 64 and 4 key/value heads (random weights, float32, batch 1) reads `context`
random tokens and then decodes one by one. What is flat over the contexts costs the same at any length.

Beside the attention kinds stand dense attention with transformers' dynamic cache (which copies all keys for every new
one) and with its static cache, and the sliding window of a Mistral with the same weights' shapes and its own cache.
The methods take turns within a round of `--tokens` tokens; the median of the rounds counts, without the first one,
which warms up. With other work on the machine read the CPU times of a run with `--threads 1`. Reading the context is
timed once, and only says roughly what it takes.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from attention import machine
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    StaticCache,
)

from hf_efficient import AttentionConfig, convert_attention
from hf_efficient.attention.cache import StateLayer
from hf_efficient.attention.registry import ATTENTIONS

CONTEXTS = (2048, 4096, 8192, 16384, 32768)
WINDOW = 256
SIZES = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1408,
    "vocab_size": 1024,
    "max_position_embeddings": 1 << 17,
}
KINDS = {
    "local": AttentionConfig("local", window=WINDOW),
    "local_global": AttentionConfig("local", window=WINDOW, global_tokens=4),
    "linear": AttentionConfig("linear"),
    "local_linear": AttentionConfig("local_linear", window=WINDOW, feature_map="hedgehog"),
    "additive": AttentionConfig("additive"),
    "topk": AttentionConfig("topk", block_size=64, top_k=4),
}
STOCK = ("full", "full_static", "transformers_window")
METHODS = (*STOCK, *(name for name, config in KINDS.items() if config.kind in ATTENTIONS))


class Reader(NamedTuple):
    """A model that has read a context, and the cache that it goes on from."""

    model: PreTrainedModel
    cache: Cache
    prefill_seconds: float


def make_model(method: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if method == "transformers_window":
        return MistralForCausalLM(MistralConfig(**SIZES, head_dim=64, sliding_window=WINDOW)).eval()
    stock = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    return stock if method in STOCK else convert_attention(stock, KINDS[method])


def read(method: str, tokens: Tensor, room: int) -> Reader:
    """The model of a method with the tokens in its cache; `room`: further tokens that will come."""
    model = make_model(method)
    static = {"config": model.config, "max_cache_len": tokens.shape[1] + room}
    cache = StaticCache(**static) if method == "full_static" else DynamicCache(config=model.config)
    start = time.perf_counter()
    model(tokens, past_key_values=cache, logits_to_keep=1)
    return Reader(model, cache, time.perf_counter() - start)


def held(cache: Cache) -> int:
    """Bytes of storage behind all layers of a cache."""
    tensors = []
    for layer in cache.layers:
        tensors += layer.state if isinstance(layer, StateLayer) else (layer.keys, layer.values)
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def decode(reader: Reader, tokens: Tensor) -> tuple[float, float]:
    """Wall and CPU seconds per token."""
    start = time.perf_counter(), time.process_time()
    for i in range(tokens.shape[1]):
        reader.model(tokens[:, i : i + 1], past_key_values=reader.cache)
    ends = time.perf_counter(), time.process_time()
    wall, cpu = ((end - begin) / tokens.shape[1] for begin, end in zip(start, ends, strict=True))
    return wall, cpu


@torch.no_grad()
def measure(methods: list[str], context: int, rounds: int, count: int) -> list[dict]:
    """One cell for each method at one context length."""
    tokens = torch.randint(SIZES["vocab_size"], (1, context + count))
    context_tokens, new_tokens = tokens[:, :context], tokens[:, context:]
    readers = {method: read(method, context_tokens, (rounds + 1) * count) for method in methods}
    taken: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
    for _ in range(rounds + 1):
        for method, reader in readers.items():
            taken[method].append(decode(reader, new_tokens))
    cells = []
    for method, reader in readers.items():
        seconds, cpu_seconds = (statistics.median(column) for column in zip(*taken[method][1:], strict=True))
        cell = {"method": method, "context": context, "seconds": seconds, "cpu_seconds": cpu_seconds}
        cell |= {"rounds": rounds, "cache_bytes": held(reader.cache), "prefill_seconds": reader.prefill_seconds}
        cells.append(cell)
    return cells


def summarize(cells: list[dict]) -> dict[str, dict]:
    """For each method how much time and bytes grow from the shortest context to the longest, and over dense."""
    rows = {(cell["method"], cell["context"]): cell for cell in cells}
    first, last = (pick(cell["context"] for cell in cells) for pick in (min, max))
    summary = {}
    for method in dict.fromkeys(cell["method"] for cell in cells):
        short, long, dense = rows[method, first], rows[method, last], rows.get(("full", last))
        growth = {f"{what}_growth": long[what] / short[what] for what in ("seconds", "cpu_seconds", "cache_bytes")}
        over = {f"{what}_of_full": long[what] / dense[what] for what in ("seconds", "cache_bytes")} if dense else {}
        summary[method] = {"from": first, "to": last, **growth, **over}
    return summary


def table(cells: list[dict], what: str, unit: float, title: str) -> str:
    """Methods down, contexts across, and the growth from the first to the last."""
    contexts = list(dict.fromkeys(cell["context"] for cell in cells))
    lines = [title, " " * 20 + "".join(f"{context:>10}" for context in contexts) + f"{'growth':>10}"]
    for method in dict.fromkeys(cell["method"] for cell in cells):
        row = [cell[what] for cell in cells if cell["method"] == method]
        lines.append(f"{method:<20}" + "".join(f"{x / unit:>10.2f}" for x in row) + f"{row[-1] / row[0]:>9.2f}x")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
    """Measure the contexts in the order given; write the JSON after each."""
    setting = {"window": WINDOW, "batch": 1, "dtype": "float32", "tokens_per_round": arguments.tokens, **SIZES}
    setting["kinds"] = {method: KINDS[method].to_dict() for method in arguments.methods if method in KINDS}
    report: dict = {"machine": machine(), "setting": setting, "cells": []}
    for context in arguments.contexts:
        report["cells"] += measure(arguments.methods, context, arguments.rounds, arguments.tokens)
        report["summary"] = summarize(report["cells"])
        if arguments.output:
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{context} tokens measured", flush=True)
    for what, unit, title in (
        ("seconds", 1e-3, "milliseconds per token"),
        ("cpu_seconds", 1e-3, "milliseconds of CPU time per token"),
        ("cache_bytes", 2**20, "MiB of cache"),
        ("prefill_seconds", 1, "seconds to read the context"),
    ):
        print("\n" + table(report["cells"], what, unit, title))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=9, help="of which the median counts")
    parser.add_argument("--tokens", type=int, default=8, help="decoded by each method in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    run(arguments)


if __name__ == "__main__":
    main()
