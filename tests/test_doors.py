"""One door for each way in and out: the package's source is read, and whoever goes around a door is named.

A rule is what a call looks like, the modules it may stand in, and the few others that have a reason.
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_efficient"


@dataclass(frozen=True)
class Rule:
    """`finds(node)`: whether a call is of this kind. `others`: module -> why it does it by itself."""

    finds: Callable[[ast.Call], bool]
    doors: tuple[str, ...]
    others: dict[str, str] = field(default_factory=dict)


def name_of(node: ast.AST) -> str:
    """`shutil.rmtree` of a dotted name; of a method on anything else only `.write_text`."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return ""


def calls(*names: str) -> Callable[[ast.Call], bool]:
    """Of a function by its dotted name, or of a method by `.name`."""

    def finds(call: ast.Call) -> bool:
        name = name_of(call.func)
        return any(name.endswith(each) if each.startswith(".") else name == each for each in names)

    return finds


def opens_for_writing(call: ast.Call) -> bool:
    name = name_of(call.func)
    if name not in ("open", "os.fdopen") and not name.endswith(".open"):
        return False
    position = 0 if name.endswith(".open") and name != "os.open" else 1
    modes = [word.value for word in call.keywords if word.arg == "mode"] + call.args[position : position + 1]
    return any(isinstance(mode, ast.Constant) and set(str(mode.value)) & set("wax+") for mode in modes)


def escapes_nothing(call: ast.Call) -> bool:
    """A jinja template whose fields are not escaped by default."""
    return name_of(call.func).endswith("Environment") and not {"autoescape", "finalize"} & {
        k.arg for k in call.keywords
    }


def marks_up_a_format(call: ast.Call) -> bool:
    """Markdown made of an f-string: whatever is filled in there is no longer escaped."""
    return name_of(call.func).endswith("Markup") and any(isinstance(each, ast.JoinedStr) for each in call.args)


RULES = {
    "what a terminal shows goes through print_text and say": Rule(
        calls("print", "typer.echo", ".stdout.write"),
        ("cli/base.py", "io/text.py"),
        {"pipeline/verify.py": "a digest of its own, read by the process that started it"},
    ),
    "Markdown of f-strings is made by io/text": Rule(
        marks_up_a_format,
        ("io/text.py",),
        {
            "reporting/tables.py": "the link of a shipped recipe, whose name is escaped",
        },
    ),
    "JSON of strangers is read by io/json": Rule(
        calls("json.load", "json.loads"),
        ("io/json.py",),
        {
            "pruning/cut/tokenizer.py": "what the tokenizers library writes of a tokenizer in memory",
            "training/meetings.py": "what the processes of one run tell each other",
        },
    ),
    "what a user named is loaded by loading": Rule(
        calls(".from_pretrained"),
        ("models/loading.py",),
        {
            "data/gguf.py": "a file that is made into the folder that is loaded",
            "models/rebuild.py": "no file is read: the weights are those of a model in memory",
            "pruning/cut/tokenizer.py": "a folder that was written a line before",
            "runtimes/formats.py": "an export that was just made, read by transformers.exporters",
        },
    ),
    "other programs are started by io/process": Rule(
        calls("subprocess.run", "subprocess.Popen", "subprocess.check_output", "subprocess.call", "os.system"),
        ("io/process.py",),
        {},
    ),
    "folders are removed by io/disk": Rule(calls("shutil.rmtree"), ("io/disk.py",), {}),
    "temporary names are made by io/disk": Rule(
        calls("tempfile.mkdtemp", "tempfile.mkstemp", "tempfile.NamedTemporaryFile"), ("io/disk.py",), {}
    ),
    "files take their final name in io/disk": Rule(
        calls("os.replace", "os.rename", "shutil.move"),
        ("io/disk.py",),
        {"pipeline/workspace.py": "the folder of a stage, which outlives a kill under its other name"},
    ),
    "files are written by io/disk": Rule(
        lambda call: calls(".write_text", ".write_bytes")(call) or opens_for_writing(call), ("io/disk.py",), {}
    ),
}


@cache
def modules() -> list[tuple[str, ast.Module]]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return [(path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def places(rule: Rule, name: str, tree: ast.AST) -> list[str]:
    return [f"{name}:{node.lineno}" for node in ast.walk(tree) if isinstance(node, ast.Call) and rule.finds(node)]


@pytest.mark.parametrize("what", RULES)
def test_nobody_goes_around_a_door(what):
    rule = RULES[what]
    around = [place for name, tree in modules() if name not in rule.doors for place in places(rule, name, tree)]
    unknown = [place for place in around if place.partition(":")[0] not in rule.others]
    assert not unknown, f"{what}, and here it is done by hand: {', '.join(unknown)}"
    unused = set(rule.others) - {place.partition(":")[0] for place in around}
    assert not unused, f"exceptions that nothing needs any more: {', '.join(sorted(unused))}"
    assert all(places(rule, name, tree) for name, tree in modules() if name in rule.doors), "a door that does nothing"


def test_templates_escape_what_they_are_not_told_about():
    environments = calls("Environment", "jinja2.Environment")
    seen = [(name, node) for name, tree in modules() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    templates = [
        (name, node)
        for name, node in seen
        if environments(node) and name.startswith(("reporting/card", "reporting/page"))
    ]
    assert {name for name, _ in templates} == {"reporting/card.py", "reporting/page.py"}
    assert not [name for name, node in templates if escapes_nothing(node)]
    assert escapes_nothing(ast.parse("Environment(trim_blocks=True)").body[0].value)


@pytest.mark.parametrize(
    ("what", "source"),
    [
        ("JSON of strangers is read by io/json", "import json\njson.loads(text)"),
        ("what a user named is loaded by loading", "AutoModel.from_pretrained(name)"),
        ("other programs are started by io/process", "import subprocess\nsubprocess.run([])"),
        ("folders are removed by io/disk", "import shutil\nshutil.rmtree(folder)"),
        ("files are written by io/disk", "path.with_suffix('.x').write_text('')"),
        ("files are written by io/disk", "open(path, 'wb')"),
        ("files are written by io/disk", "path.open(mode='a')"),
        ("Markdown of f-strings is made by io/text", "Markup(f'# {title}')"),
        ("what a terminal shows goes through print_text and say", "print(report.base_model)"),
    ],
)
def test_a_way_around_is_seen(what, source):
    assert places(RULES[what], "new.py", ast.parse(source))
    assert not places(RULES["files are written by io/disk"], "new.py", ast.parse("open(path)\npath.open('rb')"))
