"""Long texts through a real decoder: perplexity by length, bytes of the cache, milliseconds per token.

    python benchmarks/long_contexts.py MODEL --output benchmarks/results/long_contexts_cpu.json
    python benchmarks/long_contexts.py MODEL --methods local streaming --lengths 8192 16384 --documents 1
    python benchmarks/long_contexts.py MODEL --data texts.csv --text-column body --window 64 --lengths 512

MODEL is a folder or a Hub id of a decoder. The articles of each topic (`--label-column`), those that the transfer does
not see, are joined to one long document; `--documents` of them are read once by each method, in pieces of `--piece`
tokens from the cache, as a chat is. At each length the perplexity of all tokens so far and of the last `--last` ones
is written down, the cache is weighed, and the next `--steps` tokens are read one by one, by the clock. As the model
is causal that is what separate runs on shorter texts would give.

    full             the model as it is
    local            the last `--window` tokens, and 4 global ones: attention sinks
    streaming        the same, with the global ones kept near the window (streaming=True)
    no_sinks         the window alone: the control
    mixed            streaming, every 4th layer full
    local_linear     the window exactly, the rest through hedgehog feature maps, as converted
    transferred      the same after `--transfer-steps` of attention transfer on rows of `--transfer-length` tokens

Perplexities do not depend on how busy the machine is; milliseconds do, so the load is written down beside them. Each
cell is written as soon as it is measured; the same command goes on with those that are missing.
"""

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from attention import machine
from decode import held
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, TrainingArguments

from hf_efficient import AttentionConfig, convert_attention, transfer_attention
from hf_efficient.data.datasets import load_dataset_any

LENGTHS = (512, 1024, 2048, 4096, 8192)
METHODS = ("full", "local", "streaming", "no_sinks", "mixed", "local_linear", "transferred")
HELD_OUT = 0.5  # of the articles of a topic
EVERY = 4  # of the layers of `mixed` one is full


def convert(method: str, model: PreTrainedModel, rows: list[dict], options: argparse.Namespace) -> PreTrainedModel:
    window = options.window
    near = AttentionConfig("local", window=window, streaming=True)
    linear = AttentionConfig("local_linear", window=window, feature_map="hedgehog")
    mixings = {
        "full": None,
        "local": AttentionConfig("local", window=window),
        "streaming": near,
        "no_sinks": AttentionConfig("local", window=window, global_tokens=0),
        "mixed": {"all": near, f"{EVERY - 1}::{EVERY}": AttentionConfig()},
        "local_linear": linear,
        "transferred": linear,
    }
    if mixings[method] is None:
        return model
    converted = convert_attention(model, mixings[method])
    if method == "transferred":
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=options.transfer_steps,
                per_device_train_batch_size=1,
                learning_rate=1e-2,
                save_strategy="no",
                report_to="none",
                logging_steps=1,
            )
            converted = transfer_attention(converted, rows, arguments)
    return converted.eval()


def long_texts(options: argparse.Namespace) -> tuple[dict[str, str], list[str]]:
    """The documents by their topics, and the articles for transfer, none of which is in a document."""
    rows = load_dataset_any(options.data, test_fraction=HELD_OUT, seed=0)
    column, documents = options.label_column, {}
    topics = rows["test"][column] if column else ["all"] * len(rows["test"])
    for topic, text in zip(topics, rows["test"][options.text_column], strict=True):
        documents.setdefault(str(topic), []).append(text)
    joined = {topic: "\n\n".join(texts) for topic, texts in sorted(documents.items())}
    return dict(list(joined.items())[: options.documents]), list(rows["train"][options.text_column])


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, options: argparse.Namespace) -> list[dict]:
    """One cell for each length: ids [1, longest + steps + 1] are read from left to right."""
    cache, losses, cells = DynamicCache(config=model.config), [], []

    def advance(end: int, piece: int) -> None:
        while (start := len(torch.cat(losses)) if losses else 0) < end:
            stop = min(start + piece, end)
            logits = model(ids[:, start:stop], past_key_values=cache, use_cache=True).logits[0].float()
            losses.append(F.cross_entropy(logits, ids[0, start + 1 : stop + 1], reduction="none"))

    for length in sorted(options.lengths):
        advance(length, options.piece)
        so_far = torch.cat(losses)[:length]
        cell = {"length": length, "loss": so_far.mean().item(), "last_loss": so_far[-options.last :].mean().item()}
        cell["cache_bytes"] = held(cache)
        start = time.perf_counter(), time.process_time()
        advance(length + options.steps, 1)
        wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
        cell |= {"ms": 1e3 * wall / options.steps, "cpu_ms": 1e3 * cpu / options.steps}
        cells.append(cell | {"load": os.getloadavg()[0]})
    return cells


def rows_of(cells: list[dict]) -> list[list[str]]:
    """A row for each method: perplexity, and that of the last tokens, at each length, then bytes and time of the
    longest that all methods have read."""
    lengths = sorted({cell["length"] for cell in cells})
    methods = [name for name in METHODS if any(cell["method"] == name for cell in cells)]
    common = max(x for x in lengths if all((m, x) in {(c["method"], c["length"]) for c in cells} for m in methods))
    rows = [["", *(f"{x:,}" for x in lengths), f"MiB at {common:,}", f"ms per token at {common:,}"]]
    for method in methods:
        row = [f"`{method}`"]
        for length in lengths:
            here = [cell for cell in cells if (cell["method"], cell["length"]) == (method, length)]
            means = [sum(cell[key] for cell in here) / len(here) for key in ("loss", "last_loss")] if here else []
            row.append("{:.1f} ({:.1f})".format(*map(math.exp, means)) if means else "")
        here = [cell for cell in cells if (cell["method"], cell["length"]) == (method, common)]
        rows.append([*row, f"{here[0]['cache_bytes'] / 2**20:.1f}", f"{min(cell['cpu_ms'] for cell in here):.0f}"])
    return rows


def page_table(report: dict) -> str:
    """For docs/howto/language-models.md."""
    header, *rows = rows_of(report["cells"])
    lines = [header, ["---"] * len(header), *rows]
    machine, setting = report["machine"], report["setting"]
    documents = len({cell["document"] for cell in report["cells"]})
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + (
        f"\n\nPerplexity of all tokens so far (of the last {setting['last']}); {documents} documents, window "
        f"{setting['window']}, {setting['transfer_steps']} steps of transfer; {setting['model']}, float32, "
        f"{machine['cpu'].split(' 64')[0]}, {setting['threads']} thread, CPU time on a machine with other work; "
        f"commit {machine['commit'][:7]}, {machine['date'][:10]}.\n"
    )


def run(options: argparse.Namespace) -> None:
    setting = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    setting["model"] = Path(options.model).name
    del setting["output"], setting["methods"], setting["lengths"]
    report = {"machine": machine(), "setting": setting, "cells": []}
    if options.output and options.output.is_file():
        report["cells"] = json.loads(options.output.read_text())["cells"]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    documents, articles = long_texts(options)
    needed = max(options.lengths) + options.steps + 1
    ids = {topic: torch.tensor([tokenizer(text)["input_ids"][:needed]]) for topic, text in documents.items()}
    if short := [topic for topic, one in ids.items() if one.shape[1] < needed]:
        raise SystemExit(f"The texts of {', '.join(short)} are shorter than {needed} tokens. Give fewer --lengths.")
    joined = tokenizer("\n\n".join(articles[: options.transfer_steps * 4]))["input_ids"]
    size = options.transfer_length
    rows = [{"input_ids": joined[i : i + size]} for i in range(0, len(joined) - size, size)]
    for method in options.methods:
        known = {(cell["document"], cell["length"]) for cell in report["cells"] if cell["method"] == method}
        missing = [topic for topic in ids if not all((topic, length) in known for length in options.lengths)]
        converted = convert(method, model, rows, options) if missing else model
        for topic in missing:
            others = [one for one in report["cells"] if (one["method"], one["document"]) != (method, topic)]
            cells = [{"method": method, "document": topic, **cell} for cell in read(converted, ids[topic], options)]
            report["cells"] = [*others, *cells]
            if options.output:
                options.output.write_text(json.dumps(report, indent=1) + "\n")
            print(f"{method}: document {topic} read", flush=True)
    print("\n" + page_table(report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a Hub id")
    parser.add_argument("--data", default="bundled:bbc-news")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--documents", type=int, default=2, help="topics that are read")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--last", type=int, default=256, help="tokens of the last part")
    parser.add_argument("--piece", type=int, default=1024, help="tokens that are read at once")
    parser.add_argument("--steps", type=int, default=8, help="tokens read one by one, by the clock")
    parser.add_argument("--transfer-steps", type=int, default=20)
    parser.add_argument("--transfer-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    run(options)


if __name__ == "__main__":
    main()
