"""What can be done with every model type of the installed transformers, tried on tiny models made by rule.

    python benchmarks/coverage.py --output benchmarks/results/coverage.json
    python benchmarks/coverage.py --only qwen2 t5 --output /tmp/some.json

`coverage_page.py` reads what it wrote: the page of all types, and what changed since an earlier result.

Each type is tried in a process of its own: its default config made small, its plain model and the most important one
with a head; attention converted, heads, neurons and layers pruned, each result saved and loaded again and compared.
`--processes` of them run side by side. A type says why it cannot do what it cannot.

Some default configs are those of no model: they do not build, say nothing where a number must be said, or give none
of the layers of a hybrid attention. With
`--configs FILE.jsonl` such types are tried with a config of that file, made small by the same rules, and their row
says `"config": "given"` instead of "default". A line is one JSON object with

    model_type    as in the config classes of transformers
    config        the fields of a config of that type
    inputs        optional, by the name of a model class and then of a parameter: inputs for that class, built from
                  exactly this config, taken where none can be made by rule: {"shape": [2, 9], "dtype": "int64",
                  "min": 0, "max": 99} for random numbers (without min and max normal ones), or with all "values"

and whatever else it has is not read. Of several lines of one type the first counts.
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
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.utils import logging

import hf_efficient
from hf_efficient import AttentionConfig, PruningConfig, convert_attention, prune
from hf_efficient.errors import HfEfficientError
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.derive.compare import distance, outputs_of
from hf_efficient.models.derive.entry import make_entry
from hf_efficient.models.derive.inputs import tiny_inputs
from hf_efficient.models.derive.observe import observing, run
from hf_efficient.models.derive.proof import prove
from hf_efficient.models.derive.tiny import NotTinyError, first_tiny, model_classes, tiny_model
from hf_efficient.models.family import ABILITIES
from hf_efficient.models.heads import auto_class_of_architecture
from hf_efficient.models.registry import remember

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
SECONDS = 240
MEMORY = 16 << 30  # bytes: what one type may take, the code of torch among it


def types() -> list[str]:
    """All model types that transformers has a model for."""
    return sorted(name for name in CONFIG_MAPPING_NAMES if any(True for _ in model_classes(_Named(name))))


class _Named:
    def __init__(self, model_type: str):
        self.model_type = model_type


def try_type(model_type: str, given: dict | None = None) -> dict:
    """The row of a type: what its default config gives, else what the given one does."""
    row: dict = {"type": model_type, "config": "default", "abilities": {}, "why": {}, "seconds": 0.0}
    start = time.perf_counter()
    try:
        model, inputs, row["config"] = _first_running(model_type, given)
        outputs_of(model, inputs)
    except Exception as error:
        row["why"]["model"] = _said(error)
        return row
    row["built_seconds"] = round(time.perf_counter() - start, 2)
    start = time.perf_counter()
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
    for one in (model, *_head_model(model.config, type(model))):
        inputs = inputs if one is model else tiny_inputs(one)
        before = outputs_of(one, inputs)
        stacks = Anatomy.of(one).stacks
        for ability in ABILITIES:
            if all(stack.entry.why_not(ability) for stack in stacks):
                continue
            try:
                changed = _convert(one) if ability == "convert" else _prune(one, PRUNED[ability])
                after = outputs_of(changed, inputs)
                if ability == "convert" and (apart := distance(after, before, inputs)) > 1e-4:
                    raise AssertionError(f"silent wrong: {apart:.1e} off")
                with tempfile.TemporaryDirectory() as folder:
                    changed.save_pretrained(folder)
                    auto = auto_class_of_architecture(type(changed).__name__.removeprefix("Efficient"))
                    loader = getattr(transformers, auto) if auto else None
                    known = loader is not None and type(changed.config) in loader._model_mapping
                    loaded = (loader if known else type(changed)).from_pretrained(folder)
                again = outputs_of(loaded.eval(), inputs)
                own, other = changed.state_dict(), loaded.state_dict()
                same = own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
                if not same or distance(again, after, inputs) > 1e-5:
                    raise AssertionError(f"silent wrong: loaded again {distance(again, after, inputs):.1e} off")
                row["abilities"].setdefault(ability, True)
            except Exception as error:
                row["abilities"][ability] = False
                row["why"].setdefault(ability, f"{type(one).__name__}: {_said(error)}")
    row["total_seconds"] = time.perf_counter() - start
    return row


def _attends(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> bool:
    with observing(model) as calls:
        run(model, inputs)
    return bool(calls)


def _first_running(model_type: str, given: dict | None) -> tuple[PreTrainedModel, dict[str, torch.Tensor], str]:
    """Of the default config, else of the given one; of that too if it alone calls attention."""
    found = None
    try:
        found = (*_running(CONFIG_MAPPING[model_type](), {}), "default")
        if given is None or _attends(*found[:2]):
            return found
    except Exception:
        if given is None:
            raise
    try:
        other = (*_running(CONFIG_MAPPING[model_type].from_dict(given["config"]), given.get("inputs", {})), "given")
        return other if found is None or _attends(*other[:2]) else found
    except Exception:
        if found is None:
            raise
        return found


def _running(config: PreTrainedConfig, given: dict) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A tiny model and inputs for it, by rule; else the model of exactly this config with the given inputs."""

    def make(small: PreTrainedConfig, whole: bool) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
        model = tiny_model(small)
        return model, tiny_inputs(model, whole)

    try:
        return first_tiny(config, make)
    except NotTinyError:
        model_class = next((one for one in model_classes(config) if one.__name__ in given), None)
        if model_class is None:
            raise
    model = tiny_model(config, model_class)
    generator = torch.Generator().manual_seed(4)
    inputs = {
        name: _tensor(value, generator)
        for name, value in given[model_class.__name__].items()
        if isinstance(value, dict)
    }
    remember(model.config, prove(make_entry(model, inputs), model, inputs))
    return model, inputs


def _tensor(said: dict, generator: torch.Generator) -> torch.Tensor:
    dtype, shape = getattr(torch, said["dtype"]), said["shape"]
    if "values" in said:
        return torch.tensor(said["values"], dtype=dtype).reshape(shape)
    if "min" in said:
        return torch.randint(int(said["min"]), int(said["max"]) + 1, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def read_configs(path: Path) -> dict[str, dict]:
    """The lines of a file of configs, by type.

    Raises:
        SystemExit: a line is no such object.
    """
    lines: dict[str, dict] = {}
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            lines.setdefault(line["model_type"], {"config": line["config"], "inputs": line.get("inputs") or {}})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SystemExit(
                f"{path}, line {number}: an object with model_type and config is wanted: {error!r}"
            ) from error
    return lines


def _head_model(config, base: type[PreTrainedModel]) -> list[PreTrainedModel]:
    module = sys.modules[base.__module__]
    classes = [one for name, one in vars(module).items() if isinstance(one, type) and issubclass(one, PreTrainedModel)]
    for end in HEAD_CLASSES:
        for one in classes:
            if one.__name__.endswith(end) and one is not base and one.config_class is type(config):
                try:
                    model = tiny_model(config, one)
                    outputs_of(model, tiny_inputs(model))
                except Exception:
                    continue
                return [model]
    return []


def _convert(model: PreTrainedModel) -> PreTrainedModel:
    attention = AttentionConfig("local", window=4096, global_tokens=0)
    stacks = Anatomy.of(model).stacks
    return convert_attention(model, {s.name: attention for s in stacks if not s.entry.why_not("convert")})


def _prune(model: PreTrainedModel, part: str) -> PreTrainedModel:
    for ratio in (0.3, 0.1, 0.03, 0.01, 0.003):  # in one tower of several there may be little to remove
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


def in_child(model_type: str, given: dict | None = None) -> dict:
    """The row of one type; what a child dies of stays its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            import resource
            import signal

            signal.alarm(SECONDS)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            torch.manual_seed(0)
            with os.fdopen(writer, "w") as file, open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
                os.dup2(nothing.fileno(), 2)
                json.dump(try_type(model_type, given), file)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {"type": model_type, "abilities": {}, "why": {"model": f"died: {status}"}}


def summary(rows: list[dict]) -> dict[str, int]:
    """How many types can do what."""

    def count(ability: str) -> int:
        return sum(bool(row["abilities"].get(ability)) for row in rows)

    return {ability: count(ability) for ability in ABILITIES} | {
        "heads or neurons": sum(
            bool({"heads", "neurons"} & {k for k, v in row["abilities"].items() if v}) for row in rows
        ),
        "converted whole": sum(bool(row["abilities"].get("convert") and row["whole"]) for row in rows),
        "built": sum("model" not in row["why"] for row in rows),
        "built from given configs": sum("model" not in row["why"] and row.get("config") == "given" for row in rows),
        "silently wrong": sum(any("silent wrong" in why for why in row["why"].values()) for row in rows),
    }


def read(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="some model types")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--configs", type=Path, help="a file of configs for types whose default config does not build")
    return parser.parse_args(words)


def main() -> None:
    args = read()
    print(f"transformers {transformers.__version__}, hf_efficient of {Path(hf_efficient.__file__).parent}", flush=True)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with ThreadPoolExecutor(args.processes) as pool:
        known = json.loads(args.output.read_text())["rows"] if args.only and args.output.exists() else []
        rows = [row for row in known if row["type"] not in args.only]  # some types again
        given, names = read_configs(args.configs) if args.configs else {}, args.only or types()
        for row in pool.map(in_child, names, [given.get(name) for name in names]):
            rows.append(row)
            print(row["type"], row["abilities"], round(row.get("total_seconds", 0), 1), flush=True)
    rows.sort(key=lambda row: row["type"])
    result = {"transformers": transformers.__version__, "types": len(rows), "counts": summary(rows), "rows": rows}
    args.output.write_text(json.dumps(result, indent=1))
    print(json.dumps(result["counts"]))


if __name__ == "__main__":
    main()
