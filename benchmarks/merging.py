"""Speed and memory of a ViT with and without token merging, forward and in training.

    python benchmarks/merging.py --output benchmarks/results/merging_cpu.json
    python benchmarks/merging.py --device cuda --batch 64 --output benchmarks/results/merging_cuda.json

A ViT-S/16 of 12 layers, 384 wide, with random weights, on random images; all models take turns within a round, and the
median of the rounds counts. `speedup` is the time of the original by that of the model with merging; the median of the
ratios round by round. `macs` are those of one image. Memory is what a training step adds at its peak (on CUDA what the
allocator says, else the largest resident set of a process of its own).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from attention import machine
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from hf_efficient import AttentionConfig, convert_attention
from hf_efficient.attention.config import decreasing_tokens
from hf_efficient.measurement.size import count_macs

SIZES = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}


def methods(image: int) -> dict[str, AttentionConfig | None]:
    """The original, 4 to 16 of every 196 tokens merged in each layer, and 8 with most of them early."""
    patches = (image // 16) ** 2
    counts = [round(patches * share) for share in (4 / 196, 8 / 196, 13 / 196, 16 / 196)]
    kinds = {f"merging {count}": AttentionConfig("merging", merged_tokens=count) for count in counts}
    early = AttentionConfig("merging", merged_tokens=decreasing_tokens(counts[1], SIZES["num_hidden_layers"]))
    return {"original": None, **kinds, f"merging {counts[1]}, early": early}


def make_model(config: AttentionConfig | None, image: int, device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SIZES, image_size=image, num_labels=10)).eval()
    return (model if config is None else convert_attention(model, config)).to(device)


def forward(model: PreTrainedModel, pixels: torch.Tensor) -> None:
    with torch.inference_mode():
        model(pixels)


def train(model: PreTrainedModel, pixels: torch.Tensor) -> None:
    model(pixels, labels=torch.zeros(len(pixels), dtype=torch.long, device=pixels.device)).loss.backward()
    model.zero_grad(set_to_none=True)


def seconds(step, model: PreTrainedModel, pixels: torch.Tensor) -> float:
    start = time.perf_counter()
    step(model, pixels)
    if pixels.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def added_memory(method: str, args: argparse.Namespace) -> int:
    """The bytes that a training step adds at its peak."""
    if args.device == "cpu":
        command = [sys.executable, __file__, "--only", method, *sys.argv[1:]]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    model, pixels = make_model(methods(args.image)[method], args.image, args.device), images(args)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train(model, pixels)
    return torch.cuda.max_memory_allocated() - before


def resident(method: str, args: argparse.Namespace) -> int:
    model, pixels = make_model(methods(args.image)[method], args.image, "cpu"), images(args)
    train(model, pixels[:1])
    before = largest_resident()
    train(model, pixels)
    return largest_resident() - before


def largest_resident() -> int:
    """In bytes. Not ru_maxrss: a child process starts with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def images(args: argparse.Namespace) -> torch.Tensor:
    return torch.randn(args.batch, 3, args.image, args.image, device=args.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", help="print the bytes of one method, for a process of its own")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        print(resident(args.only, args))
        return
    models = {name: make_model(config, args.image, args.device) for name, config in methods(args.image).items()}
    pixels, times = images(args), {}
    for step in (forward, train):
        for number in range(args.rounds + 1):  # the first warms up
            for name, model in models.items():
                taken = seconds(step, model, pixels)
                if number:
                    times.setdefault((name, step.__name__), []).append(taken)
    rows = []
    for name in models:
        row = {"method": name, "macs": count_macs(models[name], {"pixel_values": pixels[:1]})}
        for step in (forward, train):
            own, original = times[name, step.__name__], times["original", step.__name__]
            ratios = [first / second for first, second in zip(original, own, strict=True)]
            row |= {f"{step.__name__}_ms": 1e3 * statistics.median(own)}
            row |= {f"{step.__name__}_speedup": statistics.median(ratios)}
        rows.append(row | {"train_bytes": added_memory(name, args)})
    settings = {name: getattr(args, name) for name in ("image", "batch", "rounds", "threads", "device")}
    report = {"environment": machine(), "settings": settings | SIZES, "rows": rows}
    print(json.dumps(rows, indent=2))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
