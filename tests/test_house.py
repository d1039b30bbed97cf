"""The house holds: imports go one way, files and functions stay small, and a newcomer is told the truth about it.

All imports are read from the source: lazy ones inside functions and those under TYPE_CHECKING count too. A name that a
table holds as text ("pruning.score.units:taylor") is no import: whoever looks it up does not know what it will be.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "hf_efficient"

# From the ground up: a room uses those before it. `errors` and `version`, beside the rooms, are for all.
ROOMS = (
    "io",
    "data",
    "reporting",
    "attention",
    "models",
    "conversion",
    "training",
    "measurement",
    "pruning",
    "distillation",
    "runtimes",
    "stages",
    "baselines",
    "recipes",
    "pipeline",
    "cli",
)
MAX_FILE, MAX_FUNCTION, MAX_ROOT = 400, 60, 8


Graph = dict[str, set[str]]


def modules() -> Iterator[tuple[str, Path, ast.Module]]:
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        if "templates" not in path.parts and "metrics" not in path.parts:
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name, path, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST, package: str, names: set[str]) -> set[str]:
    """The modules of ours that a module in `package` imports anywhere."""
    targets = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            whole = {f"{base}.{alias.name}" for alias in node.names}
            targets |= (whole & names) or {base}
    return targets & names


@pytest.fixture(scope="module")
def graph() -> Graph:
    parsed = list(modules())
    names = {name for name, _, _ in parsed}
    graph = {}
    for name, path, tree in parsed:
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        graph[name] = imported(tree, package, names) - {name}
    return graph


def find_cycle(graph: Graph) -> list[str]:
    """Some nodes that reach each other, [] if there are none."""
    left = {node: set(targets) for node, targets in graph.items()}
    while True:
        free = [node for node, targets in left.items() if not targets & left.keys()]
        if not free:
            break
        for node in free:
            del left[node]
    ahead = {target for targets in left.values() for target in targets}
    while left.keys() - ahead:  # what only leads into a cycle
        left = {node: targets for node, targets in left.items() if node in ahead}
        ahead = {target for targets in left.values() for target in targets}
    return sorted(left)


def entries_of(folder: str, graph: Graph) -> Graph:
    """What the files and folders that lie in `folder` import of each other."""
    depth, entries = len(folder.split(".")), {}
    for node, targets in graph.items():
        inside = [each for each in (node, *targets) if each.startswith(f"{folder}.")]
        if inside[:1] == [node]:
            entry = node.split(".")[depth]
            entries.setdefault(entry, set()).update(each.split(".")[depth] for each in inside[1:])
            entries[entry].discard(entry)
    return entries


def test_no_file_imports_itself_in_a_circle(graph):
    assert not find_cycle(graph)


def test_no_folder_has_a_circle_of_files_and_folders(graph):
    folders = {name.rpartition(".")[0] for name in graph if name.count(".") > 1}
    assert len(folders) > 20
    assert not {folder: cycle for folder in folders if (cycle := find_cycle(entries_of(folder, graph)))}


def test_rooms_use_only_rooms_below_them(graph):
    rooms = {name.split(".")[1] for name in graph if name.count(".") > 1}
    assert rooms == set(ROOMS)
    upward = [
        f"{name} imports {target}"
        for name, targets in graph.items()
        for target in targets
        if (here := name.split(".")[1:2]) and (there := target.split(".")[1:2])
        if {*here, *there} <= rooms and ROOMS.index(there[0]) > ROOMS.index(here[0])
    ]
    assert not upward


def test_the_root_is_no_lobby():
    files = [path.name for path in (ROOT / PACKAGE).glob("*.py")]
    assert len(files) <= MAX_ROOT, files


def test_files_and_functions_stay_small():
    long, folders = [], (PACKAGE, "tests", "benchmarks", "scripts")
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        place, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > MAX_FILE:
            long.append(f"{place}: {lines} lines")
        for node in ast.walk(ast.parse(text)) if place.startswith(PACKAGE) else ():
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > MAX_FUNCTION:
                long.append(f"{place}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert not long, long


def test_contributing_names_the_rooms_and_nothing_that_is_not_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for room in ROOMS:
        assert f"`{room}/`" in text, room
    order = [text.index(f"| `{room}/` |") for room in ROOMS]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("from ..b import c", "hf_efficient.a", {"hf_efficient.b.c"}),
        ("def f():\n    from ..b.c import name", "hf_efficient.a", {"hf_efficient.b.c"}),
        ("import hf_efficient.b.c as c", "hf_efficient.a", {"hf_efficient.b.c"}),
        ("from . import d", "hf_efficient.a", {"hf_efficient.a.d"}),
        ("from ..b import name", "hf_efficient.a", {"hf_efficient.b"}),
        ("import torch", "hf_efficient.a", set()),
    ],
)
def test_imports_of_every_form_are_read(source, package, expected):
    names = {"hf_efficient.b", "hf_efficient.b.c", "hf_efficient.a.d"}
    assert imported(ast.parse(source), package, names) == expected


def test_circles_are_found():
    line = {"p.a.x": {"p.b.y"}, "p.b.y": {"p.c"}, "p.c": set()}
    assert not find_cycle(line)
    assert find_cycle(line | {"p.c": {"p.b.y"}, "p.d": {"p.c"}}) == ["p.b.y", "p.c"]
    folders = {"p.a.x": {"p.b.y"}, "p.b.z": {"p.a.w"}, "p.b.y": set(), "p.a.w": set()}
    assert not find_cycle(folders) and find_cycle(entries_of("p", folders)) == ["a", "b"]
