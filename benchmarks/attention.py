"""Time and peak memory of every attention kind against dense SDPA and against what others offer for the same work.

    python benchmarks/attention.py --output benchmarks/results/attention_cpu.json
    python benchmarks/attention.py --kinds lsh --lengths 2048 8192 --skip-memory
    python benchmarks/attention.py --resume --output benchmarks/results/attention_cpu.json

B1 H12 D64 float32 on CPU, random inputs. What is measured stands in `attention_methods.py`, what it is held to in
`attention_summary.py`, whose tables end the run. The default run takes some 20 minutes on a quiet machine.

Times: the methods take turns within a round, so that a busy machine slows all of them. It does not slow them alike: a
method of many short parallel steps waits at each; with other work on the machine read the CPU-time ratio of a run with
`--threads 1`. The median of the rounds counts, without the first one, which warms up; a method that takes seconds has
fewer rounds, and dense attention beyond 8192 tokens one. Others' modules are timed without their projections.

Memory: what one call adds to the resident set at its peak, in a process of its own whose allocator gives freed memory
back at once. transformers' window mask is made outside the timed call (a model makes it once for all layers) but
counts as memory; FlexAttention's does not count.
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
from pathlib import Path

import torch
from attention_methods import (
    CONFIGS,
    DIM,
    HEADS,
    PEERS,
    Method,
    installed,
    make_method,
    our_names,
)
from attention_summary import BACKWARD, CAUSAL, FORWARD, dense_for, index, speedup, summarize, tables
from torch import Tensor

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
MEMORY_LENGTHS = (1024, 4096, 8192, 16384)
PEERS_FROM = 1024  # the shortest length at which others are measured; below, only the break-even length matters
ROUNDS = {  # up to this length; and one more that warms up
    FORWARD: {512: 30, 1024: 10, 8192: 5, 32768: 3},
    BACKWARD: {512: 20, 1024: 6, 8192: 3, 16384: 2, 32768: 1},
}
BUDGET = 20.0  # seconds of one method at one length and mode, after which it gets no further round
DENSE = ("dense", "dense" + CAUSAL)


class Job:
    """One method at one length: its tensors, and the seconds (wall, CPU) of its steps."""

    def __init__(self, method: Method, leaves: list[Tensor], directions: dict):
        self.method, self.leaves, self.directions = method, leaves, directions
        self.taken: list[tuple[float, float]] = []

    def step(self, backward: bool) -> None:
        """One forward, or forward and backward."""
        if not backward:
            with torch.no_grad():
                self.method.call(*self.leaves)
            return
        out = self.method.call(*self.leaves)
        key = (tuple(out.shape), out.stride())
        if key not in self.directions:
            self.directions[key] = torch.ones_like(out)
        out.backward(self.directions[key])
        for tensor in (*self.leaves, *self.method.parameters):
            tensor.grad = None

    def timed_step(self, backward: bool) -> None:
        start = time.perf_counter(), time.process_time()
        self.step(backward)
        self.taken.append((time.perf_counter() - start[0], time.process_time() - start[1]))

    def spent(self) -> float:
        return sum(wall for wall, _ in self.taken)

    def cell(self) -> dict:
        counted = self.taken[1:] or self.taken
        seconds, cpu_seconds = (statistics.median(column) for column in zip(*counted, strict=True))
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "repeats": len(counted)}


class Inputs:
    """Query, key and value of one length, laid out once for each layout."""

    def __init__(self, length: int, backward: bool):
        self.tensors = tuple(torch.randn(1, HEADS, length, DIM) for _ in range(3))
        self.backward, self.laid_out = backward, {}

    def leaves(self, method: Method) -> list[Tensor]:
        if method.lay_out not in self.laid_out:
            laid_out = method.lay_out(*self.tensors)
            self.laid_out[method.lay_out] = [tensor.detach().requires_grad_(self.backward) for tensor in laid_out]
        return self.laid_out[method.lay_out]


def time_methods(names: list[str], length: int, backward: bool, rounds: int) -> dict[str, dict]:
    """Median seconds of every method; one that fails gets its error instead."""
    inputs, directions = Inputs(length, backward), {}
    jobs, cells = {}, {}

    def attempt(name: str, action) -> None:
        try:
            action()
        except Exception as error:  # recorded: the other methods' numbers are still wanted
            cells[name] = {"error": _described(error)}
            jobs.pop(name, None)

    def prepare(name: str) -> None:
        method = make_method(name, length)
        jobs[name] = Job(method, inputs.leaves(method), directions)

    for name in names:
        attempt(name, lambda name=name: prepare(name))
    for _ in range(rounds + 1):
        for name, job in list(jobs.items()):
            if not job.taken or job.spent() + job.taken[-1][0] <= BUDGET:
                attempt(name, lambda job=job: job.timed_step(backward))
    return cells | {name: job.cell() for name, job in jobs.items()}


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (peak)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_memory(name: str, lengths: list[int], backward: bool) -> dict[int, int]:
    """Bytes that one step adds at its peak, for each length; after a step at the shortest one."""
    peaks: dict[int, int] = {}
    for length in (lengths[0], *lengths):
        inputs = Inputs(length, backward)
        flex = make_method(name, length) if name.startswith("flex") else None
        if flex:  # compiling is no part of a step
            Job(flex, inputs.leaves(flex), {}).step(backward)
        layout = inputs.leaves(flex or make_method(name, 512))
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = resident("VmRSS")
        Job(flex or make_method(name, length), layout, {}).step(backward)
        peaks[length] = max(resident("VmHWM") - before, 0)
        del inputs, layout
    return peaks


def measure_memory(name: str, lengths: list[int], backward: bool, threads: int) -> dict[int, int]:
    """`peak_memory` in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, "--threads", str(threads)]
    command += ["--backward"] * backward + ["--lengths", *map(str, lengths)]
    # A fixed threshold keeps glibc from holding on to larger and larger freed blocks.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        print(f"memory of {name}: {run.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return {}
    return {int(length): peak for length, peak in json.loads(run.stdout.splitlines()[-1]).items()}


def machine() -> dict:
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    git = ["git", "-C", str(Path(__file__).parent)]
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


class Run:
    """The report as it grows: cells replace those of the same method, mode and length."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.cells = arguments, {}
        self.report = {"machine": machine(), "setting": {"batch": 1, "heads": HEADS, "head_dim": DIM}}
        self.report["setting"] |= {"dtype": "float32", "configs": CONFIGS}
        if arguments.output and arguments.output.exists() and (arguments.resume or arguments.merge):
            old = json.loads(arguments.output.read_text())
            self.cells = {(cell["method"], cell["mode"], cell["length"]): cell for cell in old["cells"]}
        self.methods, self.report["not_measured"] = choose_methods(arguments.kinds)
        self.report["peers"] = {
            name: {"package": installed(name), "of": PEERS[name].of, "exact": PEERS[name].exact} for name in PEERS
        }

    def measure(self) -> None:
        """Times first, in the order of the lengths given; the file is written after each part."""
        for length in self.arguments.lengths:
            for mode in (FORWARD, BACKWARD):
                self.measure_times(length, mode)
        if not self.arguments.skip_memory:
            for name in self.methods:
                for mode in (FORWARD, BACKWARD):
                    self.measure_memory(name, mode)
        print(tables(self.report, self.arguments.markdown))

    def measure_times(self, length: int, mode: str) -> None:
        wanted, skipped = [], {}
        for name in self.methods:
            known = self.cells.get((name, mode, length))
            if self.arguments.resume and known and "error" not in known:
                continue
            if name in PEERS and length < PEERS_FROM:
                continue
            reason = self.beyond(name, mode, length)
            if reason:
                skipped[name] = {"skipped": reason}
            else:
                wanted.append(name)
        if not wanted and not skipped:
            return
        if wanted:
            dense = [name for name in DENSE if name not in wanted and not self.beyond(name, mode, length)]
            limits = ROUNDS[mode]
            rounds = self.arguments.repeats or next((limits[n] for n in limits if length <= n), 1)
            skipped |= time_methods(dense + wanted, length, mode == BACKWARD, rounds)
        for name in skipped:
            self.cells[name, mode, length] = {"method": name, "length": length, "mode": mode, **skipped[name]}
        self.add_speedups(length, mode, list(skipped))
        self.write()
        print(*(format_cell(self.cells[name, mode, length]) for name in skipped), sep="\n", flush=True)

    def beyond(self, name: str, mode: str, length: int) -> str:
        """Why the method is not measured at this length; empty where it is."""
        if name in DENSE:
            longest = self.arguments.dense_backward_to if mode == BACKWARD else max(LENGTHS)
            return "a minute and more for each call: ask with --dense-backward-to" if length > longest else ""
        if name not in PEERS:
            return ""
        peer = PEERS[name]
        return peer.reason if length > (peer.backward_to if mode == BACKWARD else peer.forward_to) else ""

    def add_speedups(self, length: int, mode: str, names: list[str]) -> None:
        """Over bidirectional dense attention, and over that of the same causality."""
        cells = index({"cells": list(self.cells.values())})
        for name in names:
            cell = self.cells[name, mode, length]
            if "seconds" in cell and ("dense", mode, length) in cells:
                cell["commit"] = self.report["machine"]["commit"][:8]
                cell["speedup_over_dense"] = speedup(cells, name, mode, length, over="dense")
                dense = cells["dense", mode, length]
                cell["cpu_speedup_over_dense"] = dense["cpu_seconds"] / cell["cpu_seconds"]
                if dense_for(name, cells) != "dense":
                    cell["speedup_over_dense_causal"] = speedup(cells, name, mode, length)

    def measure_memory(self, name: str, mode: str) -> None:
        cells = {length: self.cells.get((name, mode, length), {}) for length in self.arguments.lengths}
        again = not self.arguments.resume
        lengths = [
            length
            for length, cell in cells.items()
            if "seconds" in cell and length in self.arguments.memory_lengths and (again or "peak_bytes" not in cell)
        ]
        if lengths:
            for length, peak in measure_memory(name, lengths, mode == BACKWARD, self.arguments.threads).items():
                cells[length]["peak_bytes"] = peak
            self.write()

    def write(self) -> None:
        self.report["cells"] = list(self.cells.values())
        self.report["summary"] = summarize(self.report)
        if self.arguments.output:
            self.arguments.output.write_text(json.dumps(self.report, indent=1) + "\n")


def choose_methods(kinds: list[str] | None) -> tuple[list[str], dict[str, str]]:
    """The methods of these kinds (or of these names) with their peers, and why others are left out."""
    chosen, left_out = list(DENSE), {}
    for name in our_names():
        base = name.removesuffix(CAUSAL)
        if not kinds or {name, base, CONFIGS[base]["kind"]} & set(kinds):
            try:
                with torch.no_grad():
                    make_method(name, 128).call(*Inputs(128, False).tensors)
                chosen.append(name)
            except Exception as error:
                left_out[name] = _described(error)
    for name, peer in PEERS.items():
        if peer.of in chosen:
            if installed(name):
                chosen.append(name)
            else:
                left_out[name] = f"pip install {peer.package}"
    for name, reason in left_out.items():
        print(f"left out: {name} ({reason})", file=sys.stderr)
    return chosen, left_out


def format_cell(cell: dict) -> str:
    head = f"{cell['length']:>6} {cell['mode']:<17} {cell['method']:<31}"
    if "seconds" not in cell:
        return f"{head} {cell.get('error') or 'skipped: ' + cell['skipped']}"[:160]
    text = f"{head} {cell['seconds'] * 1e3:>9.1f} ms"
    if "speedup_over_dense" in cell:
        text += f" {cell['speedup_over_dense']:>7.2f}x (CPU time {cell['cpu_speedup_over_dense']:.2f}x)"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", help="kinds, or names of methods; default: all, with their peers")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--memory-lengths", type=int, nargs="+", default=list(MEMORY_LENGTHS))
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument(
        "--repeats", type=int, help="rounds that count; default: 30 for short inputs to 1 for the longest"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--dense-backward-to", type=int, default=16384, help="dense forward+backward up to this length"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--resume", action="store_true", help="measure only what the output does not have yet")
    parser.add_argument("--merge", action="store_true", help="keep what the output has of other methods and lengths")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the end as Markdown")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.memory_of:
        print(json.dumps(peak_memory(arguments.memory_of, arguments.lengths, arguments.backward)))
        return
    Run(arguments).measure()


if __name__ == "__main__":
    main()
