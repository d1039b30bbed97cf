"""Prune a model that is larger than the memory it gets: a random Llama on the disk, under a hard limit, in a process
of its own.

    python benchmarks/pruning_folder.py --size 3b --limit 3 --output benchmarks/results/pruning_folder_cpu.json
    python benchmarks/pruning_folder.py --model path/to/folder --rows 64 --length 256

The limit is RLIMIT_DATA, GiB of memory that the process may allocate (heap and anonymous mappings; the code of its
libraries, mapped from files, is not counted). The peak of resident memory, which counts that too, is measured beside.
The output file keeps a run of each model, length and number of rows.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import LlamaConfig

from hf_efficient import PruningConfig, plan, prune
from hf_efficient.io.environment import Environment, package_commit
from hf_efficient.io.tensors import write_tensors
from hf_efficient.models.loading import load_config
from hf_efficient.models.on_disk import StoredModel, model_class, skeleton
from hf_efficient.pruning.price.resources import predict
from hf_efficient.reporting.tables import markdown

SIZES = {  # hidden, neurons, layers, heads, key/value heads, tokens
    "tiny": (64, 128, 3, 4, 2, 500),
    "1b": (2048, 8192, 16, 32, 8, 32_000),
    "3b": (3072, 8192, 28, 24, 8, 32_000),
    "3b-two-layers": (3072, 8192, 2, 24, 8, 32_000),  # as wide: the same peak in a tenth of the time
}
PEAK = "VmHWM:"


def write_model(folder: Path, size: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """A Llama with random weights, a file for each layer; it is never whole in memory."""
    hidden, neurons, layers, heads, kv_heads, tokens = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=tokens,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    names: dict[str, dict[str, torch.Size]] = {}
    for name, weight in skeleton(model_class(config), config, dtype).state_dict().items():
        part = name.split(".")[2] if ".layers." in name else "outside"
        names.setdefault(f"model-{part}.safetensors", {})[name] = weight.shape
    generator = torch.Generator().manual_seed(0)
    for file, shapes in names.items():
        tensors = {}
        for name, shape in shapes.items():
            noise = torch.empty(shape, dtype=dtype)
            tensors[name] = noise.fill_(1) if len(shape) == 1 else noise.normal_(0, 0.02, generator=generator)
        write_tensors(folder / file, tensors)
    index = {"metadata": {}, "weight_map": {name: file for file, shapes in names.items() for name in shapes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def peak_memory() -> int:
    """Bytes that were resident at most in this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(PEAK))
    return int(line.split()[1]) << 10


def measure(folder: Path, target: Path, limit: float, rows: int, length: int, ratio: float) -> dict:
    """Prune under the limit, in this process; what it took, and what was predicted."""
    config = PruningConfig(ratio=ratio, sequence_length=length, allocation="uniform")
    stock = load_config(folder)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, stock.vocab_size, (rows, length), generator=generator)
    batches = [{"input_ids": part} for part in ids.split(1)]
    before = peak_memory()
    if limit:
        size = int(limit * (1 << 30))
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    start, spent = time.perf_counter(), time.process_time()
    result = prune(folder, config, batches, output_dir=target)
    seconds, spent = time.perf_counter() - start, time.process_time() - spent
    peak = peak_memory()
    needs = predict(StoredModel.open(folder).model, plan(folder, config), rows, length, 1)
    small, dense = StoredModel.open(result), StoredModel.open(folder)
    return {
        "parameters": dense.model.num_parameters(),
        "parameters_after": small.model.num_parameters(),
        "weight_bytes": dense.weight_bytes,
        "limit_bytes": int(limit * (1 << 30)) or None,
        "rows": rows,
        "length": length,
        "imported_bytes": before,
        "peak_bytes": peak,
        "predicted_bytes": needs.memory_bytes,
        "seconds": seconds,
        "cpu_seconds": spent,
        "predicted_seconds": needs.seconds,
        "threads": torch.get_num_threads(),
        "dtype": str(dense.model.dtype),
    }


def keep(output: Path, run: dict) -> None:
    """Add a run to the file, in place of an older one of the same."""
    same = ("parameters", "rows", "length", "limit_bytes")
    old = json.loads(output.read_text())["runs"] if output.is_file() else []
    runs = [each for each in old if any(each[name] != run[name] for name in same)]
    made = {"commit": package_commit(), "environment": asdict(Environment.collect())}
    report = {"benchmark": "pruning_folder", "runs": [*runs, run | made]}
    output.write_text(json.dumps(report, indent=1) + "\n")


def page_table(report: dict) -> str:
    """Markdown: what was predicted, and what it took."""
    header = ("", "weights", "peak of memory", "predicted", "processor time", "predicted")
    rows, places = [], []
    for run in sorted(report["runs"], key=lambda run: run["parameters"]):
        name = f"{run['parameters'] / 1e9:.1f}B parameters, {run['rows']} x {run['length']} tokens"
        memory = (f"{run[key] / 2**30:.2f} GiB" for key in ("weight_bytes", "peak_bytes", "predicted_bytes"))
        rows.append((name, *memory, *(f"{run[key] / 60:.0f} min" for key in ("cpu_seconds", "predicted_seconds"))))
        machine = f"{run['environment']['cpu']}, {run['threads']} thread{'s' * (run['threads'] > 1)}"
        limit = f"limit {run['limit_bytes'] / 2**30:.1f} GiB" if run["limit_bytes"] else "no limit"
        places.append(
            f"{name}: {limit}, {run['dtype'].removeprefix('torch.')}, {machine}, commit {run['commit'][:7]}."
        )
    return f"{markdown(header, rows)}\n\n" + "\n".join(places) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="3b", help="Of the random model.")
    parser.add_argument("--model", type=Path, help="A folder, instead of a random model.")
    parser.add_argument("--limit", type=float, default=3.0, help="GiB; 0: none.")
    parser.add_argument("--rows", type=int, default=8, help="Five at least: a fifth of them is held out of the fit.")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--work", type=Path, help="Where the model and the result are written; default: a new folder.")
    parser.add_argument("--output", type=Path, help="JSON.")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        numbers = measure(args.model, args.work / "small", args.limit, args.rows, args.length, args.ratio)
        print(json.dumps(numbers))
        return
    with tempfile.TemporaryDirectory() as made:
        work = args.work or Path(made)
        work.mkdir(parents=True, exist_ok=True)
        folder = args.model or work / "dense"
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors*")):
            write_model(folder, args.size)
        words = ["--limit", args.limit, "--rows", args.rows, "--length", args.length, "--ratio", args.ratio]
        command = [sys.executable, __file__, "--child", "--model", folder, "--work", work, *words]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True, text=True)
    line = done.stdout.strip().splitlines()[-1]
    print(line)
    if args.output:
        keep(args.output, json.loads(line))


if __name__ == "__main__":
    main()
