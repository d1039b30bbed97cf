"""What needs a GPU, one part in a process; `scripts/gpu.py` (`make gpu`) runs them all within ten minutes.

    python benchmarks/gpu.py kinds --output kinds.json
    python benchmarks/gpu.py decode --device cpu --output cpu.json        # tiny: tries the program

`machine` says what it runs on. `kinds`: every attention in float32, float16 and bfloat16 against the same on the CPU
in float32, with gradients and generation. `speed`: milliseconds of forward and backward, by attention and length, in
bfloat16, beside SDPA. `decode`: milliseconds per token and bytes of the cache after each context. `compile`, `prune`
and `distill` do that once. Ends with 1, having written all, if something is not as it should be.
"""

import argparse
import copy
import importlib.util
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_efficient import AttentionConfig, convert_attention
from hf_efficient.attention.cache import StateLayer
from hf_efficient.attention.dispatch import make_variant
from hf_efficient.attention.variant import HeadShape
from hf_efficient.io.environment import Environment, package_commit

KINDS = {
    "full": AttentionConfig(),
    "local": AttentionConfig("local", window=64),
    "local_streaming": AttentionConfig("local", window=64, streaming=True),
    "strided": AttentionConfig("strided"),
    "topk": AttentionConfig("topk"),
    "lsh": AttentionConfig("lsh"),
    "linear": AttentionConfig("linear"),
    "hedgehog": AttentionConfig("linear", feature_map="hedgehog"),
    "local_linear": AttentionConfig("local_linear", window=64, feature_map="hedgehog"),
    "additive": AttentionConfig("additive"),
    "kernel": AttentionConfig("kernel"),
}
CHOOSING = ("topk", "lsh")  # rounding may choose another block, so half precision is another function
TOLERANCES = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}  # mean error of the mean size
LENGTHS = (2048, 8192, 32768)
HEADS, KV_HEADS, DIM = 12, 4, 64


def llama(small: bool, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    width, count = (64, 4) if small else (512, 8)
    heads = {"num_attention_heads": count, "num_key_value_heads": count // 2, "head_dim": width // count}
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "vocab_size": 256}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=1 << 17)).eval()


def finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def clock(work: Callable[[], object], device: str, rounds: int) -> float:
    """Median milliseconds, after two that warm up and compile."""
    taken = []
    for _ in range(rounds + 2):
        finish(device)
        start = time.perf_counter()
        work()
        finish(device)
        taken.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(taken[2:]), 4)


def machine(device: str, small: bool) -> dict:
    facts = {**asdict(Environment.collect()), "commit": package_commit(), "date": time.strftime("%Y-%m-%d")}
    for name in ("triton", "fla", "accelerate", "peft"):
        facts[name] = importlib.util.find_spec(name) is not None
    if not facts["fla"]:
        facts["not_tried"] = "the kernels of flash-linear-attention: the package `fla` is not installed"
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        facts |= {"memory_gib": round(found.total_memory / 2**30, 1), "capability": f"{found.major}.{found.minor}"}
        facts["cuda"] = torch.version.cuda
    return facts


def kinds(device: str, small: bool) -> dict:
    """Outputs, gradients and generated tokens of every attention on the device, in three precisions."""
    cells, failures, length = [], [], 100 if small else 700
    ids, mask = torch.randint(3, 256, (2, length)), torch.ones(2, length, dtype=torch.long)
    mask[0, : length // 4] = 0
    real = mask.bool()
    for name, config in KINDS.items():
        model = convert_attention(llama(small), config)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, use_cache=False).logits[real]
        for dtype, tolerance in TOLERANCES.items():
            cell = {"kind": name, "dtype": str(dtype).removeprefix("torch.")}
            try:
                cell |= check(copy.deepcopy(model).to(device, dtype), ids.to(device), mask.to(device), expected, real)
                is_bound = name not in CHOOSING or dtype is torch.float32
                if not cell["finite"] or not cell["generates"] or (is_bound and cell["error"] > tolerance):
                    failures.append(cell)
            except Exception:  # whatever a kernel may raise: the others are tried all the same
                failures.append({**cell, "traceback": traceback.format_exc()[-1500:]})
            cells.append(cell)
    return {"cells": cells, "failures": failures}


def check(model: LlamaForCausalLM, ids: Tensor, mask: Tensor, expected: Tensor, real: Tensor) -> dict:
    out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False)
    out.loss.backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with torch.no_grad():
        got = out.logits.float().cpu()[real]
        text = model.generate(ids[:, -40:], max_new_tokens=8, do_sample=False, eos_token_id=None)
    return {
        "error": round(float((got - expected).abs().mean() / expected.abs().mean()), 5),
        "finite": bool(got.isfinite().all()) and all(bool(grad.isfinite().all()) for grad in grads),
        "generates": text.shape[1] == 48,
    }


def speed(device: str, small: bool) -> dict:
    """Milliseconds of each attention alone, batch 1, causal."""
    cells, failures, dtype = [], [], torch.float32 if small else torch.bfloat16
    for length in (256,) if small else LENGTHS:
        query, key, value = (
            torch.randn(1, heads, length, DIM, device=device, dtype=dtype, requires_grad=True)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        for name, config in KINDS.items():
            if config.streaming:  # which needs a model with positions
                continue
            cell = {"kind": name, "length": length}
            try:
                forward = attention(config, device, dtype)
                with torch.no_grad():
                    cell["forward_ms"] = clock(lambda: forward(query, key, value), device, 3 if small else 10)  # noqa: B023
                both = lambda: forward(query, key, value).sum().backward()  # noqa: B023, E731
                cell["both_ms"] = clock(both, device, 3 if small else 10)
            except Exception:
                failures.append({**cell, "traceback": traceback.format_exc()[-1500:]})
            cells.append(cell)
    return {"cells": cells, "failures": failures}


def attention(config: AttentionConfig, device: str, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if config.kind == "full":
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return lambda query, key, value: sdpa(query, key, value, is_causal=True, enable_gqa=True)
    variant = make_variant(config.resolve(causal=True), HeadShape(HEADS, KV_HEADS, DIM)).to(device, dtype)
    options = {"causal": True, "scaling": None, "dropout": 0.0, "bias": None}
    return lambda query, key, value: variant(query, key, value, None, **options)


@torch.no_grad()
def decode(device: str, small: bool) -> dict:
    """Milliseconds per token after a context, and bytes of the cache."""
    cells, dtype = [], torch.float32 if small else torch.bfloat16
    contexts = (128,) if small else LENGTHS
    for name in ("full", "local", "local_streaming", "linear", "local_linear", "topk"):
        model = convert_attention(llama(small, 4), KINDS[name]).to(device, dtype)
        for context in contexts:
            cache = DynamicCache(config=model.config)
            model(torch.randint(256, (1, context), device=device), past_key_values=cache, logits_to_keep=1)
            token = torch.randint(256, (1, 1), device=device)
            step = lambda: model(token, past_key_values=cache)  # noqa: B023, E731
            cell = {"kind": name, "context": context, "ms": clock(step, device, 4 if small else 30)}
            cells.append(cell | {"cache_bytes": held(cache)})
    by_place = {(cell["kind"], cell["context"]): cell["cache_bytes"] for cell in cells}
    grown = [kind for kind in ("local", "linear") if by_place[kind, contexts[-1]] > by_place[kind, contexts[0]]]
    return {"cells": cells, "failures": [f"the cache of {kind} grows" for kind in grown]}


def held(cache: DynamicCache) -> int:
    """Bytes of keys and values, or of the states in their place."""
    layers = (one.state if isinstance(one, StateLayer) else (one.keys, one.values) for one in cache.layers)
    return sum(tensor.nbytes for layer in layers for tensor in layer)


def compiled(device: str, small: bool) -> dict:
    """torch.compile gives what the model gives, forward and backward."""
    cells, failures = [], []
    ids = torch.randint(256, (2, 64 if small else 512), device=device)
    for name in ("local", "linear", "strided"):
        model = convert_attention(llama(small), KINDS[name]).to(device)
        torch._dynamo.reset()
        start, results = time.perf_counter(), []
        for one in (model, torch.compile(model, backend="eager" if small else "inductor")):
            model.zero_grad()
            out = one(input_ids=ids, labels=ids, use_cache=False)
            out.loss.backward()
            results.append((out.logits.detach(), model.model.embed_tokens.weight.grad.clone()))
        errors = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results, strict=True)]
        cells.append({"kind": name, "errors": errors, "seconds": round(time.perf_counter() - start, 1)})
        failures += [cells[-1]] if max(errors) > 1e-2 else []
    return {"cells": cells, "failures": failures}


def prune(device: str, small: bool) -> dict:
    """Units leave, key/value heads merge; what stays is on the device, makes up for them, and fits the forecast."""
    from hf_efficient import PruningConfig, merge_kv_heads, plan
    from hf_efficient import prune as pruned

    model = llama(small, 4).to(device)
    batches = [{"input_ids": torch.randint(256, (4, 64), device=device)} for _ in range(4)]
    with torch.no_grad():
        expected = model(**batches[0]).logits
    errors, sizes = {}, {}
    for name, fitted in (("fitted", True), ("cut", False)):
        chosen = plan(model, PruningConfig(ratio=0.3, reconstruct=fitted), batches)
        result = pruned(model, plan=chosen, calibration=batches)
        with torch.no_grad():
            errors[name] = float((result(**batches[0]).logits - expected).square().mean())
        sizes[name] = result.num_parameters(), chosen.forecast.parameters
    merged = merge_kv_heads(model, 1, batches)
    failures = [f"{name}: {a} parameters, {b} planned" for name, (a, b) in sizes.items() if a != b]
    failures += ["reconstruction does not help"] if not errors["fitted"] < errors["cut"] else []
    failures += ["the result is elsewhere"] if {result.device.type, merged.device.type} != {device} else []
    return {"errors": errors, "parameters": [model.num_parameters(), *sizes["fitted"]], "failures": failures}


def distill(device: str, small: bool) -> dict:
    """A pruned student learns from its teacher in bfloat16: the loss falls."""
    from hf_efficient import DistillationArguments, DistillationTrainer, PruningConfig
    from hf_efficient import prune as pruned

    teacher = llama(small, 4)
    student = pruned(teacher, PruningConfig(ratio=0.3, importance="magnitude"))
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(256, (64, 64))]
    with tempfile.TemporaryDirectory() as folder:
        on_gpu = {"bf16": True} if device == "cuda" else {"use_cpu": True}
        options = {"max_steps": 6 if small else 60, "per_device_train_batch_size": 8, "logging_steps": 1, **on_gpu}
        arguments = DistillationArguments(
            folder, losses={"kd": 1.0}, learning_rate=1e-3, save_strategy="no", report_to="none", **options
        )
        trainer = DistillationTrainer(model=student, teacher=teacher, args=arguments, train_dataset=rows)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    failures = [] if losses[-1] < losses[0] else ["the loss does not fall"]
    failures += [] if student.device.type == device else ["the student is elsewhere"]
    return {"first_loss": losses[0], "last_loss": losses[-1], "steps": len(losses), "failures": failures}


PARTS = {
    "machine": machine,
    "kinds": kinds,
    "speed": speed,
    "decode": decode,
    "compile": compiled,
    "prune": prune,
    "distill": distill,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    result = PARTS[options.part](options.device, options.device == "cpu")
    if options.device == "cuda" and options.part != "machine":
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for failure in result.get("failures", ()):
        print(failure if isinstance(failure, str) else json.dumps(failure, indent=1))
    sys.exit(bool(result.get("failures")))


if __name__ == "__main__":
    main()
