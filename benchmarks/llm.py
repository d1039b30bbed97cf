"""A real language model pruned without training, beside what else there is: perplexity at each size, in two domains.

    python benchmarks/llm.py bundled:smollm2-135m --off-domain bundled:film-plots \
        --output benchmarks/results/llm_cpu.json
    python benchmarks/llm.py meta-llama/Llama-3.2-1B --texts mine.txt --off-domain other.txt --output llama.json
    python benchmarks/llm.py MODEL --fractions 0.2 --seeds 0 --methods default uniform flap --output quick.json

A fraction counts *all* parameters, embeddings too. All methods calibrate with the same rows, as recipes do: `--tokens`
tokens of the texts, drawn by the seed, and as many that the model writes itself. Other texts are held out; the second
domain is never seen. Perplexity counts each token of the dense model's tokenizer, so models with fewer tokens compare.
Those that need no data run once. Peers: `llm_peers.py`; what is not installed is left out.

Ours are `default` (`PruningConfig(ratio, metric="parameters")`: heads and neurons, over the whole network), `uniform`
(as many of them in every layer, so that the result is a stock class), `layers`, and `texts-alone` (`default` without
the model's own words). `vocabulary` and `vocabulary-uniform` begin with the tokens: those of the rarer half, by their
ids, leave as far as no calibration text has them.

Each cell is written as soon as it is measured; the same command goes on with those that are missing. Scores are taken
once for all sizes, as a sweep does, so that the seconds of the first cell count them alone.
"""

import argparse
import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch
from llm_peers import PEERS
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_efficient import PruningConfig, prune_vocabulary, self_calibration
from hf_efficient.data.bundled import bundled_dataset
from hf_efficient.errors import ConfigError
from hf_efficient.io.environment import Environment, package_commit
from hf_efficient.io.text import Markup
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.loading import load_model, load_processor
from hf_efficient.models.modes import using_threads
from hf_efficient.models.rebuild import is_portable
from hf_efficient.pruning.cut.vocabulary import kept_tokens
from hf_efficient.pruning.price.costs import make_costs
from hf_efficient.pruning.prune import search
from hf_efficient.pruning.score.handing import Batch
from hf_efficient.pruning.search import Search
from hf_efficient.reporting.tables import markdown

DENSE = "dense"
WITHOUT_DATA = ("magnitude", "random")  # of the peers
OURS = {
    "default": {},
    "uniform": {"allocation": "uniform"},
    "layers": {"granularity": "layer"},
    "texts-alone": {},
    "vocabulary": {},
    "vocabulary-uniform": {"allocation": "uniform"},
}
METHODS = (*OURS, *PEERS)
FRACTIONS = (0.05, 0.1, 0.2, 0.3)
DOMAINS = ("in domain", "off domain")


class Texts:
    """What calibrates and what is held out, as token ids of the dense model."""

    def __init__(self, options: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.length, self.model = tokenizer, options.length, model
        self.words: dict[int, torch.Tensor] = {}  # by seed
        own = read_texts(options.texts)
        self.held_out, self.own = own[: len(own) // 5], own[len(own) // 5 :]
        self.held = {
            name: self.blocks(texts, options.held_out // self.length)
            for name, texts in zip(DOMAINS, (self.held_out, read_texts(options.off_domain)), strict=True)
        }

    def blocks(self, texts: Iterable[str], count: int) -> torch.Tensor:
        """`[count, length]`: texts one after another, an end of text behind each."""
        ids: list[int] = []
        for text in texts:
            ids += [*self.tokenizer(text).input_ids, self.tokenizer.eos_token_id]
            if len(ids) >= count * self.length:
                return torch.tensor(ids[: count * self.length]).view(count, self.length)
        raise SystemExit(f"The texts have {len(ids)} tokens, {count * self.length} are asked for. Give longer ones.")

    def calibration(self, seed: int, tokens: int) -> torch.Tensor:
        order = torch.randperm(len(self.own), generator=torch.Generator().manual_seed(seed)).tolist()
        return self.blocks((self.own[index] for index in order), tokens // self.length)

    def own_words(self, seed: int, tokens: int) -> torch.Tensor:
        if seed not in self.words:
            batches = self_calibration(self.model, tokens // self.length, self.length, seed=seed)
            self.words[seed] = torch.cat([batch["input_ids"] for batch in batches])
        return self.words[seed]


def read_texts(name: str) -> list[str]:
    """Of a bundled data set, in a fixed order, or of a file: one in each line."""
    if name.startswith("bundled:"):
        return bundled_dataset(name.removeprefix("bundled:")).shuffle(seed=1)["text"][:]
    lines = Path(name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip()]


def perplexity(model: PreTrainedModel, blocks: torch.Tensor, spelled: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """exp of the mean loss of a token of `blocks`; `spelled` gives a row in the tokens of the model."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for row in blocks:
            ids = spelled(row)
            logits = model(ids[None]).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
            count += len(row) - 1
    return math.exp(total / count)


class Bench:
    """The cells of one output file."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.model = load_model("AutoModelForCausalLM", options.model, dtype=torch.float32).eval()
        self.tokenizer = load_processor(options.model)
        self.texts = Texts(options, self.model, self.tokenizer)
        names = ("model", "texts", "off_domain", "length", "tokens", "held_out")
        self.settings = {name: getattr(options, name) for name in names}
        self.cells: dict[str, dict] = {}
        self.scored: tuple[tuple, Search] | None = None
        if options.output.is_file():
            old = json.loads(options.output.read_text())
            if old["settings"] != self.settings:
                raise SystemExit(f"{options.output} was made with other settings: choose another --output.")
            self.cells = {_key(cell): cell for cell in old["cells"]}

    def run(self) -> None:
        options = self.options
        self.cell(DENSE, 0.0, 0)
        for seed in options.seeds:
            for method in options.methods:
                for fraction in options.fractions:
                    if method not in WITHOUT_DATA or seed == options.seeds[0]:
                        self.cell(method, fraction, seed)

    def cell(self, method: str, fraction: float, seed: int) -> None:
        asked = {"method": method, "fraction": fraction, "seed": seed}
        if _key(asked) in self.cells:
            return
        start = time.perf_counter()
        try:
            small, parameters, spelled = self.make(method, fraction, seed)
        except (ConfigError, ImportError) as error:
            print(f"{method} {fraction}: left out. {error}", flush=True)
            return
        seconds = time.perf_counter() - start
        embeddings = small.get_input_embeddings().weight.numel()
        whole, outside = self.model.num_parameters(), self.model.get_input_embeddings().weight.numel()
        cell = asked | {
            "removed": round(1 - parameters / whole, 4),
            "removed_without_embeddings": round(1 - (parameters - embeddings) / (whole - outside), 4),
            "perplexity": {name: round(perplexity(small, ids, spelled), 3) for name, ids in self.texts.held.items()},
            "portable": method not in PEERS and is_portable(small),
            "seconds": round(seconds, 1),
            "peak_gib_so_far": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            "load_average": round(os.getloadavg()[0], 2),
        }
        print(cell, flush=True)
        self.cells[_key(cell)] = cell
        self.write()

    def make(self, method: str, fraction: float, seed: int):
        """The small model, its parameters, and how a row of the dense tokenizer's ids is spelled for it."""
        if method == DENSE:
            return self.model, self.model.num_parameters(), _same
        model, spelled = self.model, _same
        remove = round(fraction * model.num_parameters())
        ids = self.texts.calibration(seed, self.options.tokens)
        if method != "texts-alone":
            ids = torch.cat([ids, self.texts.own_words(seed, self.options.tokens)])
        if method.startswith("vocabulary"):
            model, spelled = self.fewer_tokens(remove, ids)
            remove -= self.model.num_parameters() - model.num_parameters()
            ids = torch.cat([spelled(row) for row in ids])
            ids = ids[: len(ids) // self.texts.length * self.texts.length].view(-1, self.texts.length)
            if remove <= 0:
                return model, model.num_parameters(), spelled
        batches: list[Batch] = [
            {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(self.options.batch)
        ]
        if method in PEERS:
            torch.manual_seed(seed)
            small, parameters = PEERS[method](model, remove, batches)
            return small.eval(), parameters, _same
        ratio = remove / make_costs(Anatomy.of(model), "parameters", 1).total
        small = self.pruned(model, PruningConfig(ratio, metric="parameters", seed=seed, **OURS[method]), batches)
        return small, small.num_parameters(), spelled

    def pruned(self, model: PreTrainedModel, config: PruningConfig, batches: list[Batch]) -> PreTrainedModel:
        """`prune(model, config, batches)`; the scores of the last call serve the next one with the same batches."""
        alike = model.config.vocab_size, config.granularity, config.seed, len(batches)
        if self.scored is None or self.scored[0] != alike:
            self.scored = None
            self.scored = alike, search(model, config, batches)
        one = replace(self.scored[1], config=config)
        return one.cutter.cut(one.plan()).model

    def fewer_tokens(self, remove: int, ids: torch.Tensor):
        """Without the rarer half of the tokens, but those that the texts and `ids` use; no more than have to leave."""
        width = self.model.get_input_embeddings().weight.shape[1] * (2 - self.model.config.tie_word_embeddings)
        tokens = self.model.config.vocab_size
        texts = [*self.texts.own, *self.tokenizer.batch_decode(ids)]
        kept = set(kept_tokens(self.model, self.tokenizer, texts, range(tokens // 2)))
        further = (token for token in range(tokens) if token not in kept)
        kept |= set(islice(further, max(0, tokens - remove // width - len(kept))))
        model, tokenizer = prune_vocabulary(self.model, self.tokenizer, texts, keep=kept)
        return model, lambda row: torch.tensor(tokenizer(self.tokenizer.decode(row)).input_ids)

    def write(self) -> None:
        report = {
            "benchmark": "llm",
            "commit": package_commit(),
            "environment": asdict(Environment.collect()),
            "threads": self.options.threads,
            "settings": self.settings,
            "cells": list(self.cells.values()),
        }
        part = self.options.output.with_suffix(".part")
        part.write_text(json.dumps(report, indent=1) + "\n")
        part.replace(self.options.output)


def _same(row: torch.Tensor) -> torch.Tensor:
    return row


def _key(cell: dict) -> str:
    return f"{cell['method']} {cell['fraction']} {cell['seed']}"


def page_table(report: dict, domain: str) -> str:
    """Markdown: perplexity over the dense one, at each fraction the mean over seeds and their range."""
    cells = report["cells"]
    dense = next(cell for cell in cells if cell["method"] == DENSE)["perplexity"][domain]
    fractions = sorted({cell["fraction"] for cell in cells} - {0.0})
    rows = []
    measured = {cell["method"] for cell in cells}
    for method in (method for method in METHODS if method in measured):
        row: list[str] = [Markup(f"`{method}`")]
        for fraction in fractions:
            own = [cell for cell in cells if (cell["method"], cell["fraction"]) == (method, fraction)]
            times = [cell["perplexity"][domain] / dense for cell in own]
            spread = f" ({min(times):.2f}-{max(times):.2f})" if len(times) > 1 else ""
            removed = sum(cell["removed"] for cell in own) / len(own) if own else 0.0
            off = f" at {removed:.1%}" if own and abs(removed - fraction) > 0.004 else ""
            mean = sum(times) / len(times) if own else 0.0
            row.append(f"{mean:.{0 if mean >= 100 else 2}f}x{spread}{off}" if own else "")
        rows.append(row)
    table = markdown([f"{domain}, times {dense:.1f}", *(f"{fraction:.0%} less" for fraction in fractions)], rows)
    used, seeds = report["settings"], sorted({cell["seed"] for cell in cells})
    return (
        f"{table}\n\n{used['model']}; calibrated with {used['tokens']:,} tokens of {used['texts']} and as many in its "
        f"own words, measured on {used['held_out']:,} tokens of\n"
        f"{used['texts' if domain == DOMAINS[0] else 'off_domain']} in rows of {used['length']}; "
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}; "
        f"{report['environment']['cpu']}, commit {report['commit'][:7]}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder, a Hub id, or bundled:NAME")
    parser.add_argument("--texts", default="bundled:bbc-news", help="bundled:NAME, or a file with a text in each line")
    parser.add_argument("--off-domain", required=True, help="the same, of another kind")
    parser.add_argument("--fractions", nargs="+", type=float, default=FRACTIONS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--tokens", type=int, default=1 << 14, help="that calibrate")
    parser.add_argument("--held-out", type=int, default=1 << 13, help="tokens of each domain")
    parser.add_argument("--batch", type=int, default=2, help="rows")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", required=True, type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    with using_threads(options.threads):
        bench = Bench(options)
        bench.run()
    for domain in DOMAINS:
        print(page_table(json.loads(options.output.read_text()), domain))


if __name__ == "__main__":
    main()
