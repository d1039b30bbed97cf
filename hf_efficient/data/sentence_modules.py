"""What lies beside the transformer in a folder of sentence-transformers: read, checked, and written again.

    modules = read_modules("out/teacher")                  # None: a plain model of transformers
    modules.pooling                                        # "mean", as `models.pooling.pool` calls it
    modules.write("out/model", width=384)                  # SentenceTransformer("out/model") makes vectors as before

    new_modules("cls").write("out/model", width=384)       # for a model that had none

Such a model is a chain, listed in `modules.json`: a Transformer, a Pooling, then what turns its vector into the final
one (Normalize, Dense). Only the transformer is compressed; all else is carried over, so its width must stay as wide as
Pooling and Dense expect. A CrossEncoder is a Transformer alone, whose head gives the score of a pair: `pooling` is
None. sentence-transformers itself is not needed here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, UnsupportedModelError, shown
from ..io.checkpoint import CONFIG, WEIGHTS, check_links, read_mapping, read_weights
from ..io.disk import copy_file, inside, write_atomic
from ..io.json import read_json

MODULES, SETTINGS = "modules.json", "config_sentence_transformers.json"
# The settings of the Transformer module, in the library's own order: the first that is there counts.
_TRANSFORMER = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Its names of the ways to pool that we know, by ours; the second is that of its older versions, which all read.
_POOLINGS = {
    "mean": ("mean", "pooling_mode_mean_tokens"),
    "cls": ("cls", "pooling_mode_cls_token"),
    "last": ("lasttoken", "pooling_mode_lasttoken"),
    "weighted_mean": ("weightedmean", "pooling_mode_weightedmean_tokens"),
}
_OTHERS = {"max": "pooling_mode_max_tokens", "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens"}
BESIDE = (MODULES, SETTINGS, *_TRANSFORMER, f"*/{CONFIG}", f"[0-9]*_*/{WEIGHTS}")  # of a repository, all that is read
_AFTER = ("Normalize", "Dense", "LayerNorm", "Dropout")  # they read one vector and give one
_OWN, _CROSS_ENCODER, _SCORING = "sentence_transformers.", "CrossEncoder", "sequence-classification"
_MOST = 100  # modules of a chain
_LONGEST = 200  # bytes of a folder's name
_AGAIN = "Take it from a good copy."


@dataclass(frozen=True)
class SentenceModules:
    """The chain behind a transformer.

    Fields:
        entries: those of `modules.json`, the transformer first.
        texts: what its JSON files hold, by their names in the folder.
        weights: its safetensors files, by the same.
        pooling: how the tokens of a text become its vector; None of a CrossEncoder.
        is_new: it was made here, and not read.
    """

    entries: tuple[Mapping[str, Any], ...]
    texts: Mapping[str, Mapping[str, Any]]
    weights: Mapping[str, Path]
    pooling: str | None
    is_new: bool = False

    @property
    def names(self) -> list[str]:
        """Of the classes after Pooling, in their order."""
        return [_kind(entry) for entry in self.entries[2:]]

    @property
    def max_length(self) -> int | None:
        """In tokens, where it is said beside the tokenizer."""
        value = self.texts.get(self._settings_of_transformer, {}).get("max_seq_length")
        return value if type(value) is int and value > 0 else None

    @property
    def lowers_case(self) -> bool:
        """Whether texts are made lower case before the tokenizer gets them."""
        return self.texts.get(self._settings_of_transformer, {}).get("do_lower_case") is True

    @property
    def compares_lengths(self) -> bool:
        """Whether vectors are compared with the lengths they have, not by their directions alone."""
        return "Normalize" not in self.names and self.texts.get(SETTINGS, {}).get("similarity_fn_name") not in (
            None,
            "cosine",
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever reads scores of the pooled vectors must know."""
        notes = []
        if "Dense" in self.names or "LayerNorm" in self.names:
            notes.append(
                f"After pooling come {', '.join(self.names)}, as they were. Distilled and scored were the pooled "
                "vectors before them."
            )
        prompts = self.texts.get(SETTINGS, {}).get("prompts")
        if isinstance(prompts, dict) and (named := [name for name, text in prompts.items() if text]):
            notes.append(
                f"The model has prompts ({', '.join(sorted(named))}), which it keeps. Here the texts were read as "
                "they stand in the data."
            )
        return tuple(notes)

    @property
    def _settings_of_transformer(self) -> str:
        return next((name for name in _TRANSFORMER if name in self.texts), _TRANSFORMER[0])

    @property
    def _pooling_file(self) -> str:
        return f"{self.entries[1]['path']}/{CONFIG}"

    def reading_as(self, tokenizer: Any) -> Any:
        """The tokenizer, which cuts texts where the chain does, and makes them lower case where it does."""
        if self.max_length is not None:
            tokenizer.model_max_length = self.max_length
        if self.lowers_case:
            from tokenizers import normalizers

            backend = tokenizer.backend_tokenizer
            own = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
        return tokenizer

    def check_taught(self, pooling: str | None, directions: bool, path: str = "") -> None:
        """ConfigError if what is to be distilled are not the vectors of a chain that was read.

        Parameters:
            pooling: what was asked for, if anything.
            directions: the vectors are taught without their lengths.
            path: what stands before the names of the settings.
        """
        if not self.is_new and pooling not in (None, self.pooling):
            raise ConfigError(
                f"{path}pooling is {pooling!r}, but the model's own Pooling is {self.pooling!r}. Leave it out."
            )
        if not self.is_new and directions and self.compares_lengths:
            raise ConfigError(
                "The vectors of this model are compared with their lengths, which embedding_loss cosine does not "
                f"teach. Set {path}embedding_loss to mse."
            )

    def check_width(self, width: int) -> None:
        """UnsupportedModelError if a transformer of this width cannot stand before what follows it."""
        told = None if self.pooling is None else _width(self.texts[self._pooling_file])
        if told not in (None, width) and set(self.names) - {"Normalize", "Dropout"}:
            raise UnsupportedModelError(
                f"The vectors would be {width} numbers wide, and {', '.join(self.names)} after pooling expect {told}. "
                f"Keep the width, or give the transformer in a folder without {MODULES}."
            )

    def write(self, folder: str | Path, *, width: int, max_length: int | None = None) -> None:
        """Write all of it beside the transformer in `folder`.

        Parameters:
            width: of the transformer's hidden states.
            max_length: in tokens, for a transformer that takes another number than it did.

        Raises:
            UnsupportedModelError: see `check_width`.
        """
        self.check_width(width)
        folder, texts = Path(folder), {name: dict(content) for name, content in self.texts.items()}
        if self.pooling is not None:
            pooling = texts[self._pooling_file]
            pooling["embedding_dimension" if "embedding_dimension" in pooling else "word_embedding_dimension"] = width
        if max_length is not None and self.is_new:
            said = texts.get(_TRANSFORMER[0], {})
            texts[_TRANSFORMER[0]] = said | {"max_seq_length": max_length, "do_lower_case": False}
        elif max_length is not None and self.max_length is not None:
            texts[self._settings_of_transformer]["max_seq_length"] = max_length
        for entry in self.entries[1:]:
            (folder / entry["path"]).mkdir(exist_ok=True)
        for name, content in texts.items():
            write_atomic(folder / name, _json(content))
        for name, source in self.weights.items():
            copy_file(source, folder / name)
        write_atomic(folder / MODULES, _json([dict(entry) for entry in self.entries]))  # the last: now it is one


def new_modules(pooling: str | None, *, normalize: bool = False) -> SentenceModules:
    """The chain of a plain transformer: Pooling and, where only directions are of use, Normalize.

    `pooling`: one of `models.pooling.POOLINGS`; None for a CrossEncoder. What such a model of an older version says of
    the activation of its scores stands in its config.json, and stays there.
    """
    kinds = ["Transformer"] if pooling is None else ["Transformer", "Pooling", *["Normalize"] * normalize]
    # By the names that every version of the library has understood.
    entries = tuple(
        {
            "idx": place,
            "name": str(place),
            "path": f"{place}_{kind}" * (place > 0),
            "type": f"sentence_transformers.models.{kind}",
        }
        for place, kind in enumerate(kinds)
    )
    prompts = {"prompts": {}, "default_prompt_name": None}
    if pooling is None:
        said = {SETTINGS: {"model_type": _CROSS_ENCODER} | prompts, _TRANSFORMER[0]: {"transformer_task": _SCORING}}
        return SentenceModules(entries, said, {}, None, is_new=True)
    modes = {flag: name == pooling for name, (_, flag) in _POOLINGS.items()} | dict.fromkeys(_OTHERS.values(), False)
    texts = {
        SETTINGS: {"model_type": "SentenceTransformer"} | prompts | {"similarity_fn_name": "cosine"},
        f"1_Pooling/{CONFIG}": modes | {"include_prompt": True},
    }
    return SentenceModules(entries, texts, {}, pooling, is_new=True)


def transformer_folder(folder: str | Path) -> Path:
    """Where the transformer of a folder lies: there or, as older models of sentence-transformers have it, in a folder
    of its own in it."""
    folder = Path(folder)
    if (folder / CONFIG).is_file() or not (folder / MODULES).is_file():
        return folder
    first = _entries(folder)[0]
    return inside(folder, first["path"]) if _kind(first) == "Transformer" else folder


def read_modules(folder: str | Path) -> SentenceModules | None:
    """The chain in a folder; None if it has no `modules.json`.

    Raises:
        CheckpointError: a file is missing, damaged, or lies elsewhere; weights as pickles only.
        UnsupportedModelError: a module, or a way to pool, that we do not know.
    """
    folder = Path(folder)
    if not (folder / MODULES).is_file():
        return None
    entries = _entries(folder)
    scores = _is_cross_encoder(folder, entries)
    if not scores:
        _check_kinds(folder, entries)
    home = transformer_folder(folder)
    inner = [entry["path"] for entry in entries[1:] if inside(folder, entry["path"]).is_dir()]
    for place in (folder, home, *(folder / path for path in inner)):
        check_links(place)
    places = dict.fromkeys(_TRANSFORMER, home)
    places |= dict.fromkeys([SETTINGS, *(f"{path}/{CONFIG}" for path in inner)], folder)
    texts = {name: read_mapping(place / name) for name, place in places.items() if (place / name).is_file()}
    if scores:
        return SentenceModules(({**entries[0], "path": ""},), texts, {}, None)
    pooling = f"{entries[1]['path']}/{CONFIG}"
    if pooling not in texts:
        raise CheckpointError(f"{folder} lacks {pooling}, which {MODULES} names. Take the folder from a good copy.")
    weights = {}
    for entry in entries[2:]:
        name = f"{entry['path']}/{WEIGHTS}"
        if entry["path"] in inner and read_weights(folder / entry["path"]):
            weights[name] = folder / name
        elif _kind(entry) in ("Dense", "LayerNorm"):
            raise CheckpointError(f"{folder} lacks {name}, which {MODULES} names. Take the folder from a good copy.")
    chain = ({**entries[0], "path": ""}, *entries[1:])
    return SentenceModules(chain, texts, weights, _pooling(texts[pooling], folder / pooling))


def _entries(folder: Path) -> list[dict[str, Any]]:
    """What `modules.json` lists, in its order: paths that lie in the folder, and names of classes."""
    path = folder / MODULES
    entries = read_json(path)
    if not isinstance(entries, list) or not 1 <= len(entries) <= _MOST:
        raise CheckpointError(f"{path} must be a list of 1 to {_MOST} modules, got {shown(entries)}. {_AGAIN}")
    for place, entry in enumerate(entries):
        fields = [entry.get("type"), entry.get("path")] if isinstance(entry, dict) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise CheckpointError(f"{path} has {shown(entry)}, where a module has a type and a path. {_AGAIN}")
        if (place or entry["path"]) and not _is_name(entry["path"]):
            raise CheckpointError(
                f"{path} has a module in {shown(entry['path'])}; it must lie in a folder in this one. {_AGAIN}"
            )
    if len({entry["path"] for entry in entries}) < len(entries):
        raise CheckpointError(f"{path} has two modules in one folder. {_AGAIN}")
    return entries


def _is_name(path: str) -> bool:
    """Whether it can be that of a folder in this one."""
    plain = path.isprintable() and path == Path(path).name and not path.startswith(".")
    return plain and 0 < len(path.encode()) <= _LONGEST


def _is_cross_encoder(folder: Path, entries: list[dict[str, Any]]) -> bool:
    """A transformer alone, with a head that scores; such files are written by version 6 and newer."""
    if len(entries) != 1 or not (folder / SETTINGS).is_file():
        return False
    check_links(folder)
    says = read_mapping(folder / SETTINGS).get("model_type") == _CROSS_ENCODER
    return says and entries[0]["type"].startswith(_OWN) and _kind(entries[0]) == "Transformer"


def _check_kinds(folder: Path, entries: list[dict[str, Any]]) -> None:
    kinds = [_kind(entry) for entry in entries]
    known = [kinds[:1] == ["Transformer"], kinds[1:2] == ["Pooling"], set(kinds[2:]) <= set(_AFTER)]
    foreign = [entry["type"] for entry in entries if not entry["type"].startswith(_OWN)]
    if all(known) and not foreign:
        return
    raise UnsupportedModelError(
        f"{folder} is a chain of {', '.join(map(shown, foreign or kinds))}. What can be compressed and written again "
        f"is sentence-transformers' own Transformer and Pooling, followed by any of {', '.join(_AFTER)}, and the "
        f"Transformer of a CrossEncoder. Else take the transformer by itself: a folder without {MODULES}, whose "
        "pooling the recipe says."
    )


def _kind(entry: Mapping[str, Any]) -> str:
    """`sentence_transformers.models.Pooling` is a Pooling, as is `...modules.pooling.Pooling` of newer versions."""
    return str(entry["type"]).rpartition(".")[2]


def _pooling(config: Mapping[str, Any], path: Path) -> str:
    """Our name of the way to pool that a config says; both its forms are read."""
    said = config.get("pooling_mode")
    if said is None:
        flags = dict(_POOLINGS.values()) | _OTHERS
        said = [name for name, flag in flags.items() if config.get(flag) is True] or ["mean"]
    modes = said if isinstance(said, list) else [said]
    known = {theirs: ours for ours, (theirs, _) in _POOLINGS.items()}
    if len(modes) != 1 or not isinstance(modes[0], str) or modes[0] not in known:
        raise UnsupportedModelError(
            f"{path} pools by {', '.join(map(shown, modes))}. What we know is one of {', '.join(known)}."
        )
    return known[modes[0]]


def _width(config: Mapping[str, Any]) -> int | None:
    value = config.get("embedding_dimension", config.get("word_embedding_dimension"))
    return value if type(value) is int else None


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
