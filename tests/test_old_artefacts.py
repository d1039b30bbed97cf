"""What was made by hf_efficient 0.1.0.dev0 is read for good, and gives the same: the files of `tests/data/artefacts`.

Only public names are used, and those of `hf_efficient.reporting`, so that these tests stay as they are whatever moves
inside the package. A test that fails here names something that users have on their disks and can no longer use.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from hf_efficient import (
    AttentionConfig,
    DataError,
    PruningPlan,
    Recipe,
    TeacherCache,
    compress,
    convert_attention,
    load_report,
    plan,
    prune,
)
from hf_efficient.reporting.card import model_card
from hf_efficient.reporting.page import report_page
from hf_efficient.reporting.tables import markdown_results, text_results, text_table

from .helpers import assert_close

DATA = Path(__file__).parent / "data" / "artefacts"
# Of the largest logit. The kept logits were computed in float64, where all machines agree to their last digit, which
# is one of float32; layer upon layer in float32, they do not.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
# Folder -> the Auto class that loads it, and the class that comes out.
MODELS = {
    "bert-stock": ("AutoModelForSequenceClassification", "BertForSequenceClassification"),
    "bert-portable": ("AutoModelForSequenceClassification", "BertForSequenceClassification"),
    "bert-pruned": ("AutoModelForSequenceClassification", "EfficientBertForSequenceClassification"),
    "bert-kinds": ("AutoModelForTokenClassification", "EfficientBertForTokenClassification"),
    "llama-local": ("AutoModelForCausalLM", "EfficientLlamaForCausalLM"),
    "t5": ("AutoModelForSeq2SeqLM", "EfficientT5ForConditionalGeneration"),
}
PLUGIN = [name for name, (_, kind) in MODELS.items() if kind.startswith("Efficient")]
GENERATING = ("llama-local", "t5")
REPORTS = {"": ("card.md", "page.html", "me/news-fast"), "run/model": ("README.md", "report.html", None)}


def load(name, **options):
    return getattr(transformers, MODELS[name][0]).from_pretrained(DATA / name, **options).eval()


def expectation(name):
    """(inputs, logits, greedy tokens or None)"""
    kept = load_file(DATA / name / "expected.safetensors")
    return kept, kept.pop("logits"), kept.pop("tokens", None)


def logits(model, name):
    with torch.no_grad():
        return model(**expectation(name)[0]).logits


def assert_as_it_was(model, name):
    expected = expectation(name)[1]
    assert_close(logits(model, name), expected, TOLERANCE[model.dtype] * expected.abs().max().item(), name)


def loader_file(name):
    """The module that lies beside the checkpoint, as transformers runs it where code is trusted."""
    spec = importlib.util.spec_from_file_location("loader_file", DATA / name / "modeling_hf_efficient.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_gives_what_it_gave(name, dtype):
    model = load(name, dtype=dtype)
    assert type(model).__name__ == MODELS[name][1] == model.config.architectures[0]
    assert_as_it_was(model, name)


@pytest.mark.parametrize("name", MODELS)
def test_other_weights_give_something_else(name):
    """So the numbers above hold the whole model: no parameter may be lost, or be read into another's place."""
    model, expected = load(name, dtype=torch.float64), expectation(name)[1]
    for key, parameter in model.named_parameters():
        if "key.bias" in key:  # softmax does not see what is added to all keys
            continue
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter += torch.randn_like(parameter)
            change = (logits(model, name) - expected).abs().max() / expected.abs().max()
            assert change > 5 * TOLERANCE[torch.float64], key
            parameter.copy_(before)


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_of_the_file_is_a_weight_of_the_model_and_of_its_next_checkpoint(name, tmp_path):
    load(name).save_pretrained(tmp_path)
    old, new = load_file(DATA / name / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize("name", PLUGIN)
def test_all_classes_that_the_config_names_are_found_by_the_loader_file(name):
    config = json.loads((DATA / name / "config.json").read_text())
    module = loader_file(name)
    assert len(config["auto_map"]) > 2
    for auto, path in config["auto_map"].items():
        file, kind = path.split(".")
        assert file == "modeling_hf_efficient" and getattr(module, kind).__name__ == kind
        if auto not in ("AutoConfig", "AutoModel"):
            assert issubclass(getattr(module, kind), transformers.PreTrainedModel)
    kind = config["auto_map"]["AutoConfig"].split(".")[1]
    assert type(AutoConfig.from_pretrained(DATA / name)) is getattr(module, kind)
    found = getattr(module, MODELS[name][1]).from_pretrained(DATA / name).eval()
    assert type(found) is type(load(name))
    assert_as_it_was(found, name)


@pytest.mark.parametrize("name", GENERATING)
def test_a_checkpoint_generates_what_it_generated(name):
    given, _, tokens = expectation(name)
    prompt = {key: given[key][:1] for key in ("input_ids", "attention_mask")}
    assert torch.equal(load(name).generate(**prompt, max_new_tokens=8, do_sample=False), tokens)
    assert len(tokens[0].unique()) > 2  # not one token again and again, which any model may say


def test_the_body_without_its_head_loads():
    body, whole = AutoModel.from_pretrained(DATA / "bert-pruned").eval(), load("bert-pruned")
    given = expectation("bert-pruned")[0]
    with torch.no_grad():
        assert torch.equal(body(**given).last_hidden_state, whole.bert(**given).last_hidden_state)
    assert type(body).__name__ == "EfficientBertModel"


def test_sizes_and_attention_are_those_that_were_saved():
    pruned, kinds, t5 = (load(name).config.to_dict()["efficient"] for name in ("bert-pruned", "bert-kinds", "t5"))
    assert pruned["kept_layers"] == {"encoder": [0, 2, 3]} and pruned["stacks"]["encoder"]["heads"] == [2, 3, 3]
    asked = [one["kind"] for one in kinds["stacks"]["encoder"]["attention"]]
    known = {"local", "strided", "lsh", "topk", "linear", "local_linear", "additive", "kernel", "full"}
    assert set(asked) == known and len(asked) == 13
    assert {one["kind"] for one in t5["stacks"]["decoder"]["attention"]} == {"local", "strided"}


def test_an_efficient_checkpoint_converts_back():
    """Full attention gives other numbers on the same weights: so the kind that was saved is the one that is used."""
    full = convert_attention(load("llama-local"), AttentionConfig("full"))
    assert (logits(full, "llama-local") - expectation("llama-local")[1]).abs().max() > 0.01


ALONE = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

def difference(auto, folder, **options):
    kept = load_file(folder + "/expected.safetensors")
    expected = kept.pop("logits")
    kept.pop("tokens", None)
    with torch.no_grad():
        found = auto.from_pretrained(folder, dtype=torch.float64, **options).eval()(**kept).logits
    return ((found - expected).abs().max() / expected.abs().max()).item()

data = sys.argv[1]
portable = difference(AutoModelForSequenceClassification, data + "/bert-portable")
print("portable", portable, "hf_efficient" in sys.modules)
trusted = {"trust_remote_code": True}
print("pruned", difference(AutoModelForSequenceClassification, data + "/bert-pruned", **trusted))
print("llama", difference(AutoModelForCausalLM, data + "/llama-local", **trusted), "hf_efficient" in sys.modules)
"""


@pytest.mark.processes
def test_without_the_import_of_the_plugin(tmp_path):
    """A portable checkpoint needs nothing; the others their loader file, which imports the plugin."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(DATA)],
        cwd=DATA.parents[1],
        env=os.environ | {"HF_HOME": str(tmp_path)},  # where transformers copies loader files to
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [re.findall(r"^(\w+) (\S+) ?(\w*)$", line) for line in done.stdout.splitlines()]
    found = {name: (float(difference), loaded) for [(name, difference, loaded)] in filter(None, lines)}
    assert found.keys() == {"portable", "pruned", "llama"}
    assert max(difference for difference, _ in found.values()) <= TOLERANCE[torch.float64]
    assert (found["portable"][1], found["llama"][1]) == ("False", "True")


def test_a_portable_checkpoint_names_nothing_of_the_plugin():
    text, stock = ((DATA / name / "config.json").read_text() for name in ("bert-portable", "bert-stock"))
    assert "fficient" not in text and "auto_map" not in text
    assert json.loads(text)["intermediate_size"] < json.loads(stock)["intermediate_size"]


def test_a_plan_is_read_and_written_again_as_it_was(tmp_path):
    found = PruningPlan.load(DATA / "plan.json")
    found.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == (DATA / "plan.json").read_bytes()
    assert found.to_dict() == json.loads((DATA / "plan.json").read_text())


def test_a_plan_gives_the_model_that_it_gave():
    found = PruningPlan.load(DATA / "plan.json")
    made, kept = prune(load("bert-stock"), plan=found), load("bert-pruned")
    assert type(made) is type(kept) and made.config.to_dict()["efficient"] == kept.config.to_dict()["efficient"]
    made, kept = made.state_dict(), kept.state_dict()
    assert made.keys() == kept.keys() and all(torch.equal(made[key], kept[key]) for key in kept)


def test_the_same_settings_give_the_same_plan():
    kept = PruningPlan.load(DATA / "plan.json")
    found = plan(load("bert-stock"), kept.config)
    assert (found.layers, found.units) == (kept.layers, kept.units)
    told, was = found.to_dict()["forecast"], kept.to_dict()["forecast"]
    assert told.keys() == was.keys() and all(told[key] == pytest.approx(was[key]) for key in was if key != "layers")
    assert told["layers"] == was["layers"]


def cache_rows():
    """(inputs, what the cache has for them)"""
    kept = load_file(DATA / "cache-rows.safetensors")
    found = {name.removeprefix("found."): value for name, value in kept.items() if name.startswith("found.")}
    return {name: value for name, value in kept.items() if not name.startswith("found.")}, found


def test_a_teacher_cache_gives_what_it_gave():
    cache = TeacherCache(DATA / "teacher-cache")
    rows, expected = cache_rows()
    found = cache.find(rows)
    assert len(cache) == len(rows["input_ids"]) == 6 and len(found) == len(expected) > 3
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    turned = cache.find({name: value.flip(0) for name, value in rows.items()})
    assert all(torch.equal(turned[name], expected[name].flip(0)) for name in expected)
    assert any((value != value.flip(0)).any() for value in expected.values())
    assert type(cache.skeleton()).__name__ == "EfficientLlamaForCausalLM"


def test_a_teacher_cache_tells_examples_apart():
    rows, _ = cache_rows()
    rows["input_ids"][0, 0] += 1
    with pytest.raises(DataError, match="1 of 6 examples"):
        TeacherCache(DATA / "teacher-cache").find(rows)


@pytest.mark.parametrize("path", sorted((DATA / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_read_as_it_was(path):
    kept = json.loads(path.with_suffix(".json").read_text())
    recipe = Recipe.from_yaml(path)
    assert recipe.to_dict() == kept["recipe"] and recipe.fingerprint() == kept["fingerprint"]
    assert Recipe.from_dict(kept["recipe"]) == recipe
    assert recipe.with_overrides({"seed": 12}).fingerprint() != kept["fingerprint"]


def test_recipes_of_all_stages_are_kept():
    recipes = [Recipe.from_yaml(path) for path in (DATA / "recipes").glob("*.yaml")]
    stages = {stage.name for recipe in recipes for stage in recipe.stages}
    assert stages == {"attention", "prune", "distill", "vocabulary", "quantize", "export"}
    assert any(recipe.sweep for recipe in recipes)


@pytest.mark.parametrize("folder", REPORTS)
def test_a_report_is_read_and_shown_as_it_was(folder):
    """Its machine and versions, where made up, are of nowhere: so card and page come from the report alone."""
    card, page, place = REPORTS[folder]
    place = {} if place is None else {"repo_id": place}
    report = load_report(DATA / folder)
    assert report.to_json() == text_of(folder, "report.json")
    images = tuple(re.findall(r"^!\[.*\]\((\S+)\)$", text_of(folder, card), re.MULTILINE))
    assert str(model_card(report, images=images, **place)) == text_of(folder, card)
    assert report_page(report, **place) == text_of(folder, page)


def test_tables_of_a_report_are_as_they_were():
    report = load_report(DATA)
    tables = [text_table(report), text_results({"fast": report}), markdown_results({"fast": report})]
    assert "\n\n".join(tables) + "\n" == text_of("", "tables.txt")


def text_of(folder, name):
    return (DATA / folder / name).read_bytes().decode()


@pytest.fixture
def run(tmp_path):
    """A copy of a run that has ended, and its recipe."""
    shutil.copytree(DATA / "run", tmp_path / "run")
    return tmp_path / "run", Recipe.from_yaml(DATA / "run" / "recipe.yaml")


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_finished_run_is_not_done_again(run):
    folder, recipe = run
    told = []
    report = compress(recipe, output_dir=folder, announce=told.append)
    assert report == load_report(DATA / "run" / "model")
    assert files(folder) == files(DATA / "run")
    assert len(told) == 1 and "nothing to do" in told[0]


@pytest.mark.processes
def test_a_run_without_its_result_takes_all_its_stages_as_they_are(run):
    folder, recipe = run
    shutil.rmtree(folder / "model")
    old, new = load_report(DATA / "run" / "model"), compress(recipe, output_dir=folder)
    assert new.stages == old.stages and len(new.stages) == 4  # with the seconds that they took
    assert (new.structure, new.student.size, new.base_model) == (old.structure, old.student.size, old.base_model)
    kept, found = files(DATA / "run"), files(folder)
    same = [path for path in kept if path.parts[0] != "model"]
    assert len(same) > 12 and all(found[path] == kept[path] for path in same)
    weights = Path("model/model.safetensors")
    assert found[weights] == kept[weights]


@pytest.mark.processes
def test_a_run_goes_on_with_the_stage_that_is_missing(run):
    folder, recipe = run
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "3-distill")
    old, new = load_report(DATA / "run" / "model"), compress(recipe, output_dir=folder)
    assert new.stages[:3] == old.stages[:3] and new.stages[3].settings == old.stages[3].settings
    assert new.stages[3] != old.stages[3]  # it took another time
    kept, found = (load_file(each / "model" / "model.safetensors") for each in (DATA / "run", folder))
    start = load_file(folder / "2-prune" / "model.safetensors")
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in kept.items()}
    assert any((found[key] - start[key]).abs().max() > 1e-3 for key in start)  # it was trained
