"""Recipes and commands in README and docs are read as the program would read them; nothing is run."""

import re
import shlex
from importlib.metadata import metadata
from pathlib import Path

import pytest
import typer
import yaml

from benchmarks.coverage import read as read_coverage
from benchmarks.coverage_page import read as read_coverage_page
from hf_efficient.cli import app, parse_overrides
from hf_efficient.cli.programs import cache_teacher as caching_script
from hf_efficient.cli.programs import distill as distillation_script
from hf_efficient.cli.programs import prune as pruning_script
from hf_efficient.data.tables import FORMATS
from hf_efficient.recipes.recipe import Recipe, shipped_recipes

from .pages import PAGES, ROOT, blocks, text

COMMANDS = typer.main.get_command(app)
SCRIPTS = {
    "scripts/distill.py": distillation_script.read,
    "scripts/cache_teacher.py": caching_script.read,
    "scripts/prune.py": pruning_script.parse,
    "benchmarks/coverage.py": read_coverage,
    "benchmarks/coverage_page.py": read_coverage_page,
}
YAML = [(page.stem, block) for page in PAGES for block in blocks(page, "yaml")]


def _lines(page: Path) -> list[str]:
    """The commands of a page's shell blocks: continued lines joined, without comments."""
    joined = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines()) if line]


LINES = [(page.stem, line) for page in PAGES for line in _lines(page)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the files that pages name: their recipes under their names, and data files."""
    monkeypatch.chdir(tmp_path)
    for _, block in YAML:
        if name := re.match(r"# (\S+\.yaml)\n", block):
            (tmp_path / name[1]).write_text(block, encoding="utf-8")
        data = (yaml.safe_load(block) or {}).get("data") if isinstance(yaml.safe_load(block), dict) else None
        if data and Path(data["name_or_path"]).suffix in FORMATS:
            (tmp_path / data["name_or_path"]).touch()
    return tmp_path


def _recipe(content: dict | list) -> Recipe:
    """A whole recipe, or the shipped one with the part that stands there: some keys, or some stages."""
    if isinstance(content, list):
        content = {"stages": content}
    whole = content if {"model", "data"} <= content.keys() else Recipe.from_yaml("bbc-news").to_dict() | content
    return Recipe.from_dict(whole)


@pytest.mark.parametrize(("page", "block"), YAML, ids=[page for page, _ in YAML])
def test_a_yaml_block_is_a_recipe_or_the_settings_of_a_script(page, block, folder):
    content = yaml.safe_load(block)
    if isinstance(content, dict) and "dataset" in content:
        path = folder / "settings.yaml"
        path.write_text(block, encoding="utf-8")
        assert distillation_script.read(["--config", str(path)])
    else:
        recipe = _recipe(content)
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        assert len(recipe.combinations()) != 1


def test_recipes_of_one_name_are_the_same_recipe():
    named: dict[str, str] = {}
    for page, block in YAML:
        if name := re.match(r"# (\S+\.yaml)\n", block):
            assert named.setdefault(name[1], block) == block, page


def _parse(line: str) -> None:
    """Read a command line to its end; an unknown command, flag or recipe raises."""
    words = shlex.split(line)
    if words[0] == "accelerate" and "-m" in words:  # accelerate launch [--its-flags] -m hf_efficient COMMAND
        words = ["hf-efficient", *words[words.index("-m") + 2 :]]
    if words[0] == "accelerate":  # accelerate launch [--its-flags] SCRIPT flags
        script = next(number for number, word in enumerate(words) if word.endswith(".py"))
        words = ["python", *words[script:]]
    if words[0] == "python":
        if "..." in words:  # flags that stand elsewhere are left out
            words = [word for word in words if word != "..."] + ["--teacher", "t", "--student", "s", "--dataset", "d"]
            words += ["--task", "causal-lm", "--output_dir", "out"]
        SCRIPTS[words[1]](words[2:])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), line
    elif words[0] == "hf-efficient":
        _parse_cli(words[1:])
    else:
        assert words[:2] in (["pip", "install"], ["hf", "auth"], ["lm_eval", "--model"]), (
            f"a command that no test knows: {line}"
        )


def _parse_cli(words: list[str]) -> None:
    name, command, rest = COMMANDS.resolve_command(typer.Context(COMMANDS), words)
    with command.make_context(name, rest) as context:
        if name == "distill":
            distillation_script.read(rest)
        elif name == "prune":
            pruning_script.parse(rest)
        elif name == "compress" and "/" not in context.params["recipe"]:  # else the folder of a run
            Recipe.from_yaml(context.params["recipe"]).with_overrides(parse_overrides(context.args))


@pytest.mark.parametrize("line", sorted({line for _, line in LINES}))
def test_a_command_can_be_read(line, folder):
    _parse(line)
    assert len(LINES) > 20


@pytest.mark.parametrize(
    "line",
    [
        "hf-efficient compact bbc-news",
        "hf-efficient compress bbc-newz",
        "hf-efficient compress bbc-news --prune.ratoi 0.5",
        "hf-efficient push out/bbc-news",
        "hf-efficient export out/model --fromat onnx",
        "python scripts/prune.py --ratio 0.5",
        "make everything",
        "curl example.org",
    ],
)
def test_a_faulty_command_is_noticed(line, folder):
    with pytest.raises((Exception, SystemExit)):
        _parse(line)


def test_commands_within_sentences_exist():
    found = {words for page in PAGES for words in re.findall(r"`hf-efficient ([a-z][^`]*)`", text(page))}
    assert len(found) > 10
    for words in found:
        name, *rest = words.split()
        command = COMMANDS.commands[name]
        flags = {flag for parameter in command.params for flag in parameter.opts}
        takes_more = command.context_settings.get("ignore_unknown_options")
        assert takes_more or {word for word in rest if word.startswith("--")} <= flags, words
        if name == "compress" and rest and rest[0].islower() and "/" not in rest[0]:
            assert rest[0] in shipped_recipes() or rest[0].endswith(".yaml"), words


def test_extras_that_pages_install_exist():
    extras = set(metadata("hf-efficient").get_all("Provides-Extra"))
    named = {extra for page in PAGES for extra in re.findall(r"hf-efficient\[(\w+)\]", text(page))}
    assert "demo" in named and named <= extras
