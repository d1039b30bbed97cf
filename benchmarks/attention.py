"""Time and peak memory of the attention functions against dense SDPA, transformers' window mask and FlexAttention.

    python benchmarks/attention.py --lengths 1024 8192 --repeats 5 --output benchmarks/results/attention_cpu.json

B1 H12 D64 float32 on CPU. Times are medians; the methods take turns within a round, so that a busy machine slows all
of them. It does not slow them alike: a method of many short parallel steps waits at each; with other work on the
machine read the CPU-time ratio of a run with `--threads 1`. Beyond 8192 tokens there is one round and no warm-up.
Peak memory is what one call adds to the resident set, measured in a process of its own. transformers' mask is made
outside the timed call (a model makes it once for all layers) but counts as memory; FlexAttention's does not count.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_efficient.attention.linear import linear_attention
from hf_efficient.attention.local import local_attention

HEADS, DIM, WINDOW = 12, 64, 64
MANY_ROUNDS = 8192  # the longest length that is measured more than once
METHODS = ("dense", "local", "linear", "linear_causal", "transformers_window", "flex_window")
FORWARD_ONLY = {"flex_window": "FlexAttention has no backward on CPU (NotImplementedError)"}


def make_call(method: str, length: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The function of (query, key, value) that `method` stands for, with its mask made."""
    if method == "local":
        return lambda q, k, v: local_attention(q, k, v, window=WINDOW)
    if method == "linear":
        return linear_attention
    if method == "linear_causal":
        return lambda q, k, v: linear_attention(q, k, v, causal=True)
    if method == "transformers_window":
        mask = transformers_mask(length)
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if method == "flex_window":
        return flex_call(length)
    return F.scaled_dot_product_attention


def transformers_mask(length: int) -> Tensor:
    """Bool [1,1,n,n]: what a transformers model with a sliding window hands to SDPA."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(
        batch_size=1,
        q_length=length,
        kv_length=length,
        mask_function=lambda batch, head, q, kv: (q - kv).abs() <= WINDOW,
        allow_is_causal_skip=False,
    )


def flex_call(length: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    mask = create_block_mask(lambda b, h, q, kv: (q - kv).abs() <= WINDOW, None, None, length, length, device="cpu")
    function = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: function(q, k, v, block_mask=mask)


def make_inputs(length: int, backward: bool) -> list[Tensor]:
    return [torch.randn(1, HEADS, length, DIM, requires_grad=backward) for _ in range(3)]


def step(call: Callable, inputs: list[Tensor], backward: bool) -> None:
    """One forward, or forward and backward."""
    if not backward:
        with torch.no_grad():
            call(*inputs)
        return
    for tensor in inputs:
        tensor.grad = None
    out = call(*inputs)
    out.backward(torch.ones_like(out))


def time_round_robin(length: int, backward: bool, repeats: int, cells: dict[str, dict]) -> None:
    """Median seconds of every method into `cells`; a method that fails gets its error instead."""
    inputs = make_inputs(length, backward)
    calls, times = {}, {}
    for method in METHODS:
        if backward and method in FORWARD_ONLY:
            cells[method] = {"error": FORWARD_ONLY[method]}
            continue
        try:
            calls[method] = make_call(method, length)
            if length <= MANY_ROUNDS or method == "flex_window":  # which compiles
                step(calls[method], inputs, backward)
        except Exception as error:  # recorded: the other methods' numbers are still wanted
            cells[method] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            calls.pop(method, None)
    for _ in range(repeats):
        for method, call in calls.items():
            start = time.perf_counter(), time.process_time()
            step(call, inputs, backward)
            times.setdefault(method, []).append((time.perf_counter() - start[0], time.process_time() - start[1]))
    for method, taken in times.items():
        seconds, cpu_seconds = (statistics.median(column) for column in zip(*taken, strict=True))
        cells[method] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "repeats": len(taken)}


def resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (peak)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_memory(method: str, lengths: list[int], backward: bool) -> dict[int, int]:
    """Bytes that one step adds at its peak, for each length; run in a fresh process, after a step at 512."""
    step(make_call(method, 512), make_inputs(512, backward), backward)
    peaks = {}
    for length in lengths:
        inputs = make_inputs(length, backward)
        compiled = make_call(method, length) if method == "flex_window" else None
        if compiled:
            step(compiled, inputs, backward)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = resident("VmRSS")
        step(compiled or make_call(method, length), inputs, backward)
        peaks[length] = max(resident("VmHWM") - before, 0)
        del inputs
    return peaks


def measure_memory(method: str, lengths: list[int], backward: bool, threads: int) -> dict[int, int]:
    command = [sys.executable, __file__, "--memory-of", method, "--threads", str(threads)]
    command += ["--backward"] * backward + ["--lengths", *map(str, lengths)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        print(f"memory of {method}: {run.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return {}
    return {int(length): peak for length, peak in json.loads(run.stdout.splitlines()[-1]).items()}


def machine() -> dict:
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    root = Path(__file__).parent
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    return {
        "commit": commit,
        "uncommitted_changes": bool(changed),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_at_start": list(os.getloadavg()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def run(arguments: argparse.Namespace) -> None:
    """Measure everything, times first, in the order of the lengths given; write the JSON after each part."""
    setting = {"batch": 1, "heads": HEADS, "head_dim": DIM, "dtype": "float32", "window": WINDOW}
    report = {"machine": machine(), "setting": setting, "cells": []}
    for length in arguments.lengths:
        for backward in (False, True):
            cells = time_cells(length, backward, arguments.repeats if length <= MANY_ROUNDS else 1)
            print(*map(format_cell, cells), sep="\n", flush=True)
            report["cells"] += cells
            write(report, arguments.output)
    for backward in (False, True):
        for method in METHODS:
            if not (backward and method in FORWARD_ONLY):
                peaks = measure_memory(method, arguments.lengths, backward, arguments.threads)
                for cell in report["cells"]:
                    if cell["method"] == method and cell["mode"] == mode_name(backward):
                        cell["peak_bytes"] = peaks.get(cell["length"])
                write(report, arguments.output)
    print(*map(format_cell, report["cells"]), sep="\n")


def time_cells(length: int, backward: bool, repeats: int) -> list[dict]:
    times: dict[str, dict] = {}
    time_round_robin(length, backward, repeats, times)
    dense = times["dense"].get("seconds")
    cells = []
    for method in METHODS:
        cell = {"method": method, "length": length, "mode": mode_name(backward), "peak_bytes": None, **times[method]}
        if dense and "seconds" in cell:
            cell["speedup_over_dense"] = dense / cell["seconds"]
            cell["cpu_speedup_over_dense"] = times["dense"]["cpu_seconds"] / cell["cpu_seconds"]
        cells.append(cell)
    return cells


def mode_name(backward: bool) -> str:
    return "forward+backward" if backward else "forward"


def write(report: dict, path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")


def format_cell(cell: dict) -> str:
    head = f"{cell['length']:>6} {cell['mode']:<17} {cell['method']:<20}"
    if "error" in cell:
        return f"{head} {cell['error'][:70]}"
    memory = "-" if cell["peak_bytes"] is None else f"{cell['peak_bytes'] / 2**20:.0f}"
    return (
        f"{head} {cell['seconds'] * 1e3:>9.1f} ms {memory:>7} MiB {cell['speedup_over_dense']:>7.2f}x "
        f"(CPU time {cell['cpu_speedup_over_dense']:.2f}x)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=5, help="rounds; beyond 8192 tokens always one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.memory_of:
        print(json.dumps(peak_memory(arguments.memory_of, arguments.lengths, arguments.backward)))
        return
    run(arguments)


if __name__ == "__main__":
    main()
