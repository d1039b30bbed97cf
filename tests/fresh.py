"""Loads checkpoints the way strangers do, every scenario in a process of its own; prints one JSON object.

    python -m tests.fresh FOLDER imported trusted order:Trainer:after

FOLDER holds one subfolder for each family: a checkpoint, `auto.txt` with the Auto class that loads it, and
`expected.safetensors` with inputs and the output they gave. What is slow to import is imported before the processes
part; no scenario starts with hf_efficient.
"""

import importlib.abc
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import accelerate  # noqa: F401
import huggingface_hub  # noqa: F401
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.tensor


def imported(folder: Path) -> dict:
    import hf_efficient  # noqa: F401

    return {name: _load_and_compare(path) for name, path in _checkpoints(folder)}


def trusted(folder: Path) -> dict:
    """Loaded with `trust_remote_code=True` alone, and saved again twice: are all the files the same?"""
    results = {}
    for name, path in _checkpoints(folder):
        result = _load_and_compare(path, trust_remote_code=True)
        for step in ("once", "twice"):
            again = path / step
            _auto(path).from_pretrained(path, trust_remote_code=True).save_pretrained(again)
            names = sorted(file.name for file in again.iterdir())
            result[step] = {file: (again / file).read_bytes() == (path / file).read_bytes() for file in names}
        results[name] = result
    return results


def untrusted(folder: Path) -> dict:
    errors = {name: _error(path, trust_remote_code=False) for name, path in _checkpoints(folder)}
    return errors | {"asked": _error(next(_checkpoints(folder))[1])}


def missing(folder: Path) -> dict:
    """As on a machine without the package."""

    class Blocker(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname, path=None, target=None):
            if fullname.partition(".")[0] == "hf_efficient":
                raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)

    sys.meta_path.insert(0, Blocker())
    return {name: _error(path, trust_remote_code=True) for name, path in _checkpoints(folder)}


def stock(folder: Path, portable: str) -> dict:
    """A portable checkpoint needs nothing of ours."""
    results = {name: _load_and_compare(path) for name, path in _checkpoints(Path(portable))}
    return results | {"plugin_imported": "hf_efficient" in sys.modules}


def order(folder: Path, first: str, when: str) -> dict:
    """hf_efficient imported before or after `first` is taken from transformers."""
    if when == "before":
        import hf_efficient
    import transformers

    getattr(transformers, first)
    if when == "after":
        import hf_efficient  # noqa: F401
    return {name: _load_and_compare(path) for name, path in _checkpoints(folder)}


SCENARIOS: dict[str, Callable[..., dict]] = {
    function.__name__: function for function in (imported, trusted, untrusted, missing, stock, order)
}


def _checkpoints(folder: Path):
    return ((path.name, path) for path in sorted(folder.iterdir()))


def _auto(path: Path):
    import transformers

    return getattr(transformers, (path / "auto.txt").read_text())


def _load_and_compare(path: Path, **kwargs) -> dict:
    from safetensors.torch import load_file

    tensors = load_file(path / "expected.safetensors")
    expected = tensors.pop("expected")
    model = _auto(path).from_pretrained(path, **kwargs)
    with torch.no_grad():
        equal = torch.equal(model(**tensors)[0], expected)
    return {"class": type(model).__name__, "module": type(model).__module__, "equal": equal}


def _error(path: Path, **kwargs) -> str:
    try:
        _auto(path).from_pretrained(path, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _in_child(folder: Path, scenario: str) -> dict:
    """Run one scenario in a fork, so that what it imports stays there."""
    assert "hf_efficient" not in sys.modules
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        name, *arguments = scenario.split(":")
        try:
            answer = SCENARIOS[name](folder, *arguments)
        except BaseException:
            answer = {"crash": traceback.format_exc()}
        with os.fdopen(send, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        answer = json.load(pipe)
    os.waitpid(child, 0)
    return answer


def _answers(folder: Path, scenarios: list[str]) -> dict[str, dict]:
    """Those that import hf_efficient themselves start without transformers; the others import it first anyway."""
    cold = [scenario for scenario in scenarios if scenario.partition(":")[0] in ("imported", "order")]
    assert "transformers" not in sys.modules
    answers = {scenario: _in_child(folder, scenario) for scenario in cold}
    if len(cold) < len(scenarios):
        import transformers.modeling_utils  # noqa: F401

        answers |= {scenario: _in_child(folder, scenario) for scenario in scenarios if scenario not in cold}
    return answers


if __name__ == "__main__":
    print(json.dumps(_answers(Path(sys.argv[1]), sys.argv[2:])))
