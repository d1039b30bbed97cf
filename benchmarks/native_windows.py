"""A model's own sliding windows: stock dense attention under a mask, against windows computed as windows.

    python benchmarks/native_windows.py --output benchmarks/results/native_windows_cpu.json
    python benchmarks/native_windows.py --lengths 512 --layers 3 --rounds 1

ModernBERT with the shape of the base model (22 layers, 768 wide, 12 heads, every third layer global, windows of 128)
and random weights, float32, batch 1, stock SDPA and `convert_attention(model, "native")`. Both take turns; the median
of the rounds counts, and the ratio is the median of the ratios within a round: other work on the machine slows both.
CPU time stands beside wall time: a process that waited for a core has much less of it than wall time times threads.
Peak memory is that of PyTorch's allocator, weights included.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from attention import machine
from transformers import ModernBertConfig, ModernBertForMaskedLM

from hf_efficient import convert_attention
from hf_efficient.measurement.size import peak_memory_bytes


def timed(model: torch.nn.Module, ids: torch.Tensor) -> tuple[float, float]:
    """Wall and CPU seconds of one forward."""
    wall, cpu = time.perf_counter(), time.process_time()
    model(input_ids=ids)
    return time.perf_counter() - wall, time.process_time() - cpu


def compared(models: dict[str, torch.nn.Module], length: int, rounds: int) -> dict:
    """Times, memory and the largest difference of the last hidden states at one length."""
    ids = torch.randint(5, 50_000, (1, length), generator=torch.Generator().manual_seed(length))
    with torch.inference_mode():
        states = [model.model(input_ids=ids).last_hidden_state for model in models.values()]  # warms up too
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for _ in range(rounds):
            for name, model in models.items():
                seconds[name].append(timed(model.model, ids))
        memory = {name: peak_memory_bytes(model.model, {"input_ids": ids}) for name, model in models.items()}
    difference = (states[0] - states[1]).abs().max()
    ratios = [[a / b for a, b in zip(*pair, strict=True)] for pair in zip(*seconds.values(), strict=True)]
    return {
        "length": length,
        "seconds": {name: statistics.median(wall for wall, _ in each) for name, each in seconds.items()},
        "cpu_seconds": {name: statistics.median(cpu for _, cpu in each) for name, each in seconds.items()},
        "speedup": statistics.median(wall for wall, _ in ratios),
        "cpu_speedup": statistics.median(cpu for _, cpu in ratios),
        "peak_bytes": memory,
        "max_difference": difference.item(),
        "largest_state": states[0].abs().max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = ModernBertConfig(num_hidden_layers=args.layers, attn_implementation="sdpa")
    stock = ModernBertForMaskedLM(config).eval()
    models = {"stock": stock, "native": convert_attention(stock, "native")}
    rows = []
    for length in args.lengths:
        rows.append(compared(models, length, args.rounds))
        print(json.dumps(rows[-1]))
        if args.output is not None:
            result = {"layers": args.layers, "rounds": args.rounds, "machine": machine(), "rows": rows}
            args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
