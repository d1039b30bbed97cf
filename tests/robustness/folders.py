"""Folders of strangers in which one file is not what it should be: a config, an index, a tokenizer's, a cache's.

Each target writes the text into its place in a folder that is good otherwise, and loads the folder as the command line
does. What is accepted must have the weights that were saved.
"""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_efficient import HfEfficientError, TeacherCache
from hf_efficient.data.sentence_modules import MODULES, SETTINGS, new_modules, read_modules
from hf_efficient.distillation.cache.cache import MANIFEST
from hf_efficient.models.families import FAMILIES
from hf_efficient.models.loading import auto_class_of, load_model, load_processor

from ..distillation.caching import make_cache
from ..distillation.tiny import make_pair
from ..families import CASES, make_model
from ..pruning.tiny_tokenizers import tokenizer_of

Document = Any
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer_config.json"
CHAIN = (MODULES, SETTINGS, "sentence_bert_config.json", "1_Pooling/config.json", "2_Dense/config.json")


@functools.cache
def place() -> Path:
    """A folder of this process, removed at its end; in memory where there is such a file system."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def good_folder(name: str) -> Path:
    """A checkpoint of a family; sharded for the index."""
    folder = place() / name
    size = {"max_shard_size": "10KB"} if name == "sharded" else {}
    make_model("bert" if name == "sharded" else name).save_pretrained(folder, **size)
    return _kept(folder, INDEX if name == "sharded" else "config.json")


@functools.cache
def tokenizer_folder() -> Path:
    folder = place() / "with-tokenizer"
    make_model("bert").save_pretrained(folder)
    tokenizer_of("bert").save_pretrained(folder)
    return _kept(folder, TOKENIZER)


@functools.cache
def cache_folder() -> Path:
    folder = place() / "cache"
    make_cache("bert", folder, make_pair("bert")[1], shard_size=10)
    return _kept(folder, MANIFEST)


def _kept(folder: Path, file: str) -> Path:
    """The folder; its file as it was stays beside the one that is changed."""
    shutil.copy(folder / file, folder / f"{file}.good")
    return folder


def _good(folder: Path, file: str) -> Document:
    return json.loads((folder / f"{file}.good").read_text(encoding="utf-8"))


def refused_or(work: Callable[[], None]) -> bool:
    """Whether `work` accepted what it was given; an error of ours is a refusal, any other a fault."""
    try:
        work()
    except HfEfficientError as error:
        assert 0 < len(str(error)) < 3000, "a message that nobody can read"
        return False
    return True


def with_file(folder: Path, file: str, text: str) -> None:
    (folder / file).write_text(text, encoding="utf-8", errors="surrogatepass")


def read_config(text: str) -> bool:
    """`{"family": name, "config": {...}}`: the config.json of that family."""
    name, content = "bert", text
    try:
        data = json.loads(text)
        if isinstance(data, dict) and data.get("family") in list(FAMILIES):
            name, content = data["family"], json.dumps(data.get("config"))
    except (ValueError, RecursionError):
        pass
    folder = good_folder(name)
    with_file(folder, "config.json", content)
    return refused_or(lambda: _same_weights(load_model(auto_class_of(folder), folder), folder))


def read_index(text: str) -> bool:
    folder = good_folder("sharded")
    with_file(folder, INDEX, text)
    return refused_or(lambda: _same_weights(load_model(auto_class_of(folder), folder), folder))


def read_tokenizer(text: str) -> bool:
    folder = tokenizer_folder()
    with_file(folder, TOKENIZER, text)
    return refused_or(lambda: load_processor(folder, images=False)("a word", truncation=True, max_length=4))


def read_cache(text: str) -> bool:
    folder = cache_folder()
    with_file(folder, MANIFEST, text)
    return refused_or(lambda: TeacherCache(folder))


def read_chain(text: str) -> bool:
    """`{file: content}` of what sentence-transformers has beside a transformer; another text is its modules.json.

    What is read is written, and read again as the same.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    folder = place() / "chain"
    shutil.rmtree(folder, ignore_errors=True)
    for inner in ("1_Pooling", "2_Dense"):
        (folder / inner).mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    save_file({"linear.weight": torch.zeros(4, 16)}, folder / "2_Dense" / "model.safetensors")
    known = data if isinstance(data, dict) and MODULES in data else {MODULES: None}
    for name in CHAIN:
        if name in known:
            with_file(folder, name, text if data is not known else json.dumps(known[name]))
    return refused_or(lambda: _same_chain(folder))


def _same_chain(folder: Path) -> None:
    modules = read_modules(folder)
    assert modules is not None and isinstance(modules.notes, tuple) and isinstance(modules.compares_lengths, bool)
    assert modules.max_length is None or modules.max_length > 0
    width, target = 16, folder / "written"
    target.mkdir()
    modules.write(target, width=width)
    again = read_modules(target)
    assert again is not None and (again.entries, again.pooling) == (modules.entries, modules.pooling)
    assert again.texts.keys() == modules.texts.keys()


def _same_weights(model: torch.nn.Module, folder: Path) -> None:
    saved = {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}
    loaded = model.state_dict()
    common = loaded.keys() & saved.keys()
    assert common, "nothing of what was saved was loaded"
    assert all(torch.equal(loaded[key].to(saved[key].dtype), saved[key]) for key in common)


def configs() -> list[Document]:
    return [{"family": name, "config": _good(good_folder(name), "config.json")} for name in CASES]


def indexes() -> list[Document]:
    return [_good(good_folder("sharded"), INDEX)]


def tokenizers() -> list[Document]:
    return [_good(tokenizer_folder(), TOKENIZER)]


def chains() -> list[Document]:
    """A model of vectors with a Dense, and a CrossEncoder."""
    documents = []
    for made in (new_modules("cls", normalize=True), new_modules(None)):
        documents.append({name: dict(content) for name, content in made.texts.items()})
        documents[-1][MODULES] = [dict(entry) for entry in made.entries]
    documents[0][MODULES][2] |= {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    documents[0] |= {"2_Dense/config.json": {"in_features": 16, "out_features": 4}}
    documents[0]["sentence_bert_config.json"] = {"max_seq_length": 256, "do_lower_case": False}
    return documents


def caches() -> list[Document]:
    return [_good(cache_folder(), MANIFEST)]
