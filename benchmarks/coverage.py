"""What can be done with every model type of the installed transformers, tried on tiny models made by rule.

    python benchmarks/coverage.py --output benchmarks/results/coverage.json
    python benchmarks/coverage.py --only qwen2 t5 --output /tmp/some.json

Each type is tried in a process of its own: its default config made small, its plain model and the most important one
with a head; attention converted, heads, neurons and layers pruned, each result saved and loaded again and compared.
`--processes` of them run side by side. A type says why it cannot do what it cannot.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.utils import logging

from hf_efficient import AttentionConfig, PruningConfig, convert_attention, prune
from hf_efficient.errors import HfEfficientError
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.derive.proof import _distance, _outputs
from hf_efficient.models.derive.tiny import model_classes, tiny_config, tiny_inputs, tiny_model
from hf_efficient.models.families import ABILITIES
from hf_efficient.models.heads import auto_class_of_architecture

HEAD_CLASSES = (
    "ForCausalLM",
    "ForConditionalGeneration",
    "LMHeadModel",
    "ForSequenceClassification",
    "ForMaskedLM",
    "ForImageClassification",
    "ForAudioClassification",
    "ForCTC",
    "ForObjectDetection",
)
PRUNED = {"heads": "head", "neurons": "neuron", "layers": "layer"}
SECONDS = 120


def types() -> list[str]:
    """All model types that transformers has a model for."""
    return sorted(name for name in CONFIG_MAPPING_NAMES if any(True for _ in model_classes(_Named(name))))


class _Named:
    def __init__(self, model_type: str):
        self.model_type = model_type


def try_type(model_type: str) -> dict:
    row: dict = {"type": model_type, "abilities": {}, "why": {}, "seconds": 0.0}
    start = time.perf_counter()
    try:
        config = tiny_config(CONFIG_MAPPING[model_type]())
        model = tiny_model(config)
        inputs = tiny_inputs(model)
        _outputs(model, inputs)
    except Exception as error:
        row["why"]["model"] = _said(error)
        return row
    row["class"] = type(model).__name__
    row["has_attention"] = any("attn" in name or "attention" in name for name, _ in model.named_modules())
    try:
        family = Anatomy.of(model).family
    except Exception as error:
        row["why"]["anatomy"] = _said(error)
        row["seconds"] = time.perf_counter() - start
        return row
    row["seconds"] = time.perf_counter() - start
    row["stacks"] = [stack.name for stack in family.stacks]
    row["left_out"] = list(family.left_out)
    row["whole"] = not family.left_out and not any(stack.why_not("convert") for stack in family.stacks)
    for stack in family.stacks:
        row["why"] |= {f"{stack.name}.{ability}": why for ability, why in stack.refusals}
    for one in (model, *_head_model(config, type(model))):
        inputs = tiny_inputs(one)
        before = _outputs(one, inputs)
        for ability in ABILITIES:
            if family.why_not(ability):
                continue
            try:
                changed = _convert(one) if ability == "convert" else _prune(one, PRUNED[ability])
                after = _outputs(changed, inputs)
                if ability == "convert" and (apart := _distance(after, before, inputs)) > 1e-4:
                    raise AssertionError(f"silent wrong: {apart:.1e} off")
                with tempfile.TemporaryDirectory() as folder:
                    changed.save_pretrained(folder)
                    auto = auto_class_of_architecture(type(changed).__name__.removeprefix("Efficient"))
                    loaded = (
                        getattr(transformers, auto).from_pretrained(folder)
                        if auto
                        else type(changed).from_pretrained(folder)
                    )
                again = _outputs(loaded.eval(), inputs)
                own, other = changed.state_dict(), loaded.state_dict()
                same = own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
                if not same or _distance(again, after, inputs) > 1e-5:
                    raise AssertionError(f"silent wrong: loaded again {_distance(again, after, inputs):.1e} off")
                row["abilities"].setdefault(ability, True)
            except Exception as error:
                row["abilities"][ability] = False
                row["why"].setdefault(ability, f"{type(one).__name__}: {_said(error)}")
    row["total_seconds"] = time.perf_counter() - start
    return row


def _head_model(config, base: type[PreTrainedModel]) -> list[PreTrainedModel]:
    module = sys.modules[base.__module__]
    classes = [one for name, one in vars(module).items() if isinstance(one, type) and issubclass(one, PreTrainedModel)]
    for end in HEAD_CLASSES:
        for one in classes:
            if one.__name__.endswith(end) and one is not base and one.config_class is type(config):
                try:
                    model = tiny_model(config, one)
                    _outputs(model, tiny_inputs(model))
                except Exception:
                    continue
                return [model]
    return []


def _convert(model: PreTrainedModel) -> PreTrainedModel:
    attention = AttentionConfig("local", window=4096, global_tokens=0)
    stacks = Anatomy.of(model).stacks
    return convert_attention(model, {s.name: attention for s in stacks if not s.entry.why_not("convert")})


def _prune(model: PreTrainedModel, part: str) -> PreTrainedModel:
    for ratio in (0.3, 0.1, 0.03):
        config = PruningConfig(
            ratio=ratio,
            importance="magnitude",
            layer_importance="magnitude",
            granularity=(part,),
            reconstruct=False,
            round_to=1,
            sequence_length=8,
        )
        try:
            return prune(model, config)
        except HfEfficientError as error:
            problem = error
    raise problem


def _said(error: Exception) -> str:
    trace = traceback.extract_tb(error.__traceback__)[-1]
    own = (
        ""
        if isinstance(error, HfEfficientError)
        else f"{type(error).__name__} at {Path(trace.filename).name}:{trace.lineno}: "
    )
    return own + " ".join(str(error).split())[:400]


def in_child(model_type: str) -> dict:
    """The row of one type; what a child dies of stays its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            import signal

            signal.alarm(SECONDS)
            torch.manual_seed(0)
            with os.fdopen(writer, "w") as file, open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
                os.dup2(nothing.fileno(), 2)
                json.dump(try_type(model_type), file)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {"type": model_type, "abilities": {}, "why": {"model": f"died: {status}"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="some model types")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with ThreadPoolExecutor(args.processes) as pool:
        rows = []
        for row in pool.map(in_child, args.only or types()):
            rows.append(row)
            print(row["type"], row["abilities"], round(row.get("total_seconds", 0), 1), flush=True)
    counts = {ability: sum(row["abilities"].get(ability, False) for row in rows) for ability in ABILITIES}
    counts["heads or neurons"] = sum(
        row["abilities"].get("heads", False) or row["abilities"].get("neurons", False) for row in rows
    )
    counts["converted whole"] = sum(row["abilities"].get("convert", False) and row["whole"] for row in rows)
    counts["built"] = sum("model" not in row["why"] for row in rows)
    result = {"transformers": transformers.__version__, "types": len(rows), "counts": counts, "rows": rows}
    args.output.write_text(json.dumps(result, indent=1))
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
