"""What reads files of strangers, each as a function of a text: it is refused, or it is read and comes back equal.

Anything but an HfEfficientError is a fault. `TARGETS` are used by hypothesis here and by scripts/fuzz.py.
"""

import csv
import io
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import yaml
from PIL import Image

from hf_efficient import CheckpointError, ConfigError, HfEfficientError, PruningConfig, PruningPlan, Recipe, Report
from hf_efficient.data.images import read_image
from hf_efficient.data.tables import read_table
from hf_efficient.errors import DataError
from hf_efficient.io.json import parse_json
from hf_efficient.io.yaml import parse
from hf_efficient.models.block import EfficientBlock, check_block
from hf_efficient.models.families import FAMILIES
from hf_efficient.pruning.plan import Forecast, LayerForecast
from hf_efficient.recipes.recipe import shipped_recipes

from ..families import make_config
from ..reporting.samples import sample_report
from . import folders

Document = Any


@dataclass(frozen=True)
class Target:
    """`read(text)` is True where the text was accepted; `documents` are some that are."""

    read: Callable[[str], bool]
    write: Callable[[Document], str]
    documents: Callable[[], list[Document]]


def read_recipe(text: str) -> bool:
    try:
        recipe = Recipe.from_dict(parse(text, "recipe.yaml"))
    except ConfigError as error:
        return _told(error)
    for again in (Recipe.from_dict(recipe.to_dict()), Recipe.from_dict(parse(recipe.to_yaml()))):
        assert again == recipe and again.fingerprint() == recipe.fingerprint()
    recipe.combinations()
    return True


def read_overrides(text: str) -> bool:
    """A mapping of dotted keys, upon a shipped recipe."""
    try:
        overrides = parse(text, "overrides")
        recipe = _base().with_overrides(overrides if isinstance(overrides, dict) else {"stages": overrides})
    except ConfigError as error:
        return _told(error)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    return True


def read_block(text: str) -> bool:
    """A family, and the `efficient` entry of its config.json."""
    try:
        data = parse_json(text)
    except ValueError:
        return False
    name, entry = "bert", data
    if isinstance(data, dict) and data.get("family") in list(FAMILIES):
        name, entry = data["family"], data.get("efficient")
    try:
        block = EfficientBlock.from_dict(entry)
        check_block(block, make_config(name), FAMILIES[name])
    except ConfigError as error:
        return _told(error)
    assert EfficientBlock.from_dict(block.to_dict()).to_dict() == block.to_dict()
    return True


def read_plan(text: str) -> bool:
    try:
        plan = PruningPlan.from_dict(parse_json(text))
    except HfEfficientError as error:
        return _told(error)
    except ValueError:
        return False
    assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))).to_dict() == plan.to_dict()
    return True


def read_report(text: str) -> bool:
    try:
        report = Report.from_json(text)
    except CheckpointError as error:
        return _told(error)
    assert Report.from_json(report.to_json()).to_json() == report.to_json()
    return True


def read_pruning(text: str) -> bool:
    """The arguments of a PruningConfig."""
    try:
        data = parse_json(text)
    except ValueError:
        return False
    if not isinstance(data, dict):
        return False
    try:
        config = PruningConfig(**{key: data[key] for key in data if key in PruningConfig.__dataclass_fields__})
    except HfEfficientError as error:
        return _told(error)
    assert PruningConfig(**config.to_dict()) == config
    return True


def read_csv(text: str) -> bool:
    return _read_rows(text, ".csv", lambda rows: to_csv([rows.column_names, *zip(*rows[:].values(), strict=True)]))


def read_jsonl(text: str) -> bool:
    return _read_rows(text, ".jsonl", to_jsonl)


def _read_rows(text: str, ending: str, write: Callable[[datasets.Dataset], str]) -> bool:
    """A data file: what is read and written again is read as the same rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"rows{ending}")
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            rows = read_table(path)
        except DataError as error:
            return _told(error)
        path.write_bytes(write(rows).encode())
        assert repr(list(read_table(path))) == repr(list(rows))
    return True


def read_encoded_image(text: str) -> bool:
    """The bytes of an image, each as the character of its number."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of broken metadata
            array = read_image(text.encode("latin-1", "replace"))
    except DataError as error:
        return _told(error)
    assert array.ndim == 3 and array.shape[0] in (1, 3) and array.min() >= 0 and array.max() <= 1
    return True


def _told(error: HfEfficientError) -> bool:
    assert 0 < len(str(error)) < 3000, "a message that nobody can read"
    return False


def _base() -> Recipe:
    return Recipe.from_yaml("bbc-news")


def recipes() -> list[Document]:
    shipped = [Recipe.from_yaml(name).to_dict() for name in shipped_recipes()]
    mixed = _base().to_dict()
    mixed["stages"].insert(0, {"attention": {"layers": {"encoder": {"all": {}, "1::2": {"kind": "local"}}}}})
    mixed["stages"].insert(0, {"attention": {"kind": "local", "layers": "0:3", "positions": 1024, "transfer": {}}})
    mixed["sweep"] = {"prune.ratio": [0.3, 0.5], "distill.temperature": [1.0, 2.0]}
    return [*shipped, mixed]


def overrides() -> list[Document]:
    return [{"prune.ratio": 0.5, "data.limit": 100, "stages.1.ratio": "0.2", "teacher": None, "seed": 3}]


def blocks() -> list[Document]:
    local, linear = {"kind": "local", "window": 4}, {"kind": "linear", "feature_map": "favor", "feature_dim": 8}
    stacks = {"encoder": {"attention": [local, {}, linear], "heads": [4, 1, 2], "neurons": [32, 1, 7]}}
    decoder = {"heads": [4, 2, 2], "kv_heads": [2, 1, 1]}
    two = {"encoder": {"heads": [2] * 3}, "decoder": {"cross_heads": [4, 1, 2], "cross_attention": [local] * 3}}
    return [
        {"family": "bert", "efficient": {"version": 1, "stacks": stacks, "kept_layers": {"encoder": [0, 3, 11]}}},
        {"family": "llama", "efficient": {"version": 1, "stacks": {"decoder": decoder}}},
        {"family": "t5", "efficient": {"version": 1, "stacks": two}},
    ]


def plans() -> list[Document]:
    layer = LayerForecast("encoder", 0, 2, 4, 8, 16, 100, 200, 1000, 2000)
    forecast = Forecast(12, "float32", "plugin", 100, 200, 1000, 2000, 400, 800, 0, 0, 0.5, 0.5, (layer,), 1.5, 2.5)
    units, config = {"encoder.0.neurons": (0, 5, 7)}, PruningConfig(ratio=0.3)
    plan = PruningPlan({"encoder": (0, 2)}, units, model="bert", config=config, forecast=forecast)
    return [PruningPlan().to_dict(), json.loads(json.dumps(plan.to_dict()))]


def reports() -> list[Document]:
    return [json.loads(sample_report().to_json())]


def pruning() -> list[Document]:
    zeros = {"granularity": ["weight"], "mask_structure": "2:4", "importance": "obs"}
    return [PruningConfig().to_dict(), PruningConfig(granularity=("layer", "head"), ratio=0.2).to_dict(), zeros]


def csv_files() -> list[Document]:
    return [[["text", "label"], ['a "b", c\nd', "01"], ["", "NA"]], [["", "a", "b"], ["0", "x\ry", "1e5"]]]


def jsonl_files() -> list[Document]:
    rows = [{"text": "é\u2028", "label": 1}, {"text": "", "label": 2.5, "tags": ["a"]}, {"answers": {"text": ["x"]}}]
    return [rows, [{"a": None}, {"a": True}]]


def encoded_images() -> list[Document]:
    """Files in pieces of a few bytes, so that the changes fall into their headers."""
    made = []
    for mode, kind in [("L", "PNG"), ("I;16", "PNG"), ("P", "GIF"), ("RGB", "JPEG"), ("F", "TIFF"), ("RGBA", "WEBP")]:
        buffer = io.BytesIO()
        Image.new(mode, (5, 4)).save(buffer, kind)
        content = buffer.getvalue().decode("latin-1")
        made.append([content[start : start + 4] for start in range(0, len(content), 4)])
    return made


def to_csv(document: Document) -> str:
    made = io.StringIO()
    try:
        csv.writer(made, quoting=csv.QUOTE_ALL).writerows(document)
    except (csv.Error, TypeError, ValueError):
        return str(document)
    return made.getvalue()


def to_jsonl(document: Document) -> str:
    try:
        return "\n".join(json.dumps(row) for row in document)
    except (TypeError, ValueError):
        return str(document)


def to_bytes(document: Document) -> str:
    return "".join(map(str, document)) if isinstance(document, list) else str(document)


def to_yaml(document: Document) -> str:
    try:
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    except yaml.YAMLError:  # tuples as keys
        return str(document)


def to_json(document: Document) -> str:
    try:
        return json.dumps(document)
    except (TypeError, ValueError):
        return str(document)


TARGETS = {
    "recipe": Target(read_recipe, to_yaml, recipes),
    "overrides": Target(read_overrides, to_yaml, overrides),
    "block": Target(read_block, to_json, blocks),
    "plan": Target(read_plan, to_json, plans),
    "report": Target(read_report, to_json, reports),
    "pruning": Target(read_pruning, to_json, pruning),
    "config": Target(folders.read_config, to_json, folders.configs),
    "index": Target(folders.read_index, to_json, folders.indexes),
    "tokenizer": Target(folders.read_tokenizer, to_json, folders.tokenizers),
    "cache": Target(folders.read_cache, to_json, folders.caches),
    "chain": Target(folders.read_chain, to_json, folders.chains),
    "csv": Target(read_csv, to_csv, csv_files),
    "jsonl": Target(read_jsonl, to_jsonl, jsonl_files),
    "image": Target(read_encoded_image, to_bytes, encoded_images),
}
