"""Cut tokens out of a fast tokenizer without changing what it makes of the texts that were counted.

    kept = complete(tokenizer, ids)              # and what those tokens cannot do without
    small = trim_tokenizer(tokenizer, kept)      # ids 0..n-1 in their old order, same token strings

Why the result is exact, for texts whose tokens are all kept (V the old tokens, K those kept):

- WordPiece takes the longest match at each place. It is in K, and K has no longer one that V lacks. A word that ended
  as unknown could now be spelled otherwise, so the pieces it matched before it failed stay too (`attempts`).
- BPE merges the pair of lowest rank until none is left. Merges never cross the border of a token of the answer, so a
  token arises in its text as it does alone; `complete` keeps all that arises on the way. A merge stays if its parts
  and its result do. Each step then finds the pair it found before: fewer merges compete, and that pair is among them.
- Unigram takes the segmentation with the best score. It is still there, with fewer rivals and the same scores. An
  unknown character costs the lowest score of the vocabulary, so a token with that score stays.

Of the alphabet stays what keeps unseen texts as known as before: single characters, or the 256 bytes.
"""

import json
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ...errors import ConfigError, UnsupportedModelError

Spec = dict[str, Any]  # a part of tokenizer.json
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
# What decides how a text is cut; truncation and padding are set by each call.
_PARTS = ("normalizer", "pre_tokenizer", "model", "post_processor", "decoder")


def check_tokenizer(tokenizer: object) -> PreTrainedTokenizerFast:
    """UnsupportedModelError for no tokenizer, one without tokenizer.json, or a vocabulary that cannot be cut."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UnsupportedModelError(
            f"A transformers tokenizer is needed, got {type(tokenizer).__name__}. "
            "Load one: AutoTokenizer.from_pretrained(...)."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} is written in Python; only fast tokenizers (those with a tokenizer.json) "
            "can be cut. Build a fast one of the same tokens: PreTrainedTokenizerFast(tokenizer_object=...)."
        )
    kind = read_spec(tokenizer)["model"]["type"]
    if kind not in _NEEDS:
        raise UnsupportedModelError(
            f"The vocabulary of this {type(tokenizer).__name__} is of the kind {kind}. "
            f"Those that can be cut: {', '.join(sorted(_NEEDS))}."
        )
    return tokenizer


def read_spec(tokenizer: PreTrainedTokenizerFast) -> Spec:
    """Its tokenizer.json."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def complete(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> tuple[int, ...]:
    """`ids` and what a tokenizer with them cannot do without, in rising order: special and added tokens, the alphabet,
    and for BPE the tokens that arise on the way to others."""
    spec = read_spec(check_tokenizer(tokenizer))
    model = spec["model"]
    is_list = model["type"] == "Unigram"  # of (piece, score)
    vocabulary = {piece: index for index, (piece, _) in enumerate(model["vocab"])} if is_list else model["vocab"]
    needed = {*ids, *tokenizer.all_special_ids, *(token["id"] for token in spec["added_tokens"])}
    needed |= _processor_ids(spec["post_processor"])
    needed |= {spec["padding"]["pad_id"]} if spec["padding"] else set()
    if model.get("unk_token") in vocabulary:
        needed.add(vocabulary[model["unk_token"]])
    return tuple(sorted(needed | _NEEDS[model["type"]](model, vocabulary, needed)))


def trim_tokenizer(tokenizer: PreTrainedTokenizerFast, kept: Iterable[int]) -> PreTrainedTokenizerFast:
    """A copy with the tokens `kept` only, renumbered 0..n-1 in their old order.

    Parameters:
        kept: ids as `complete` gives them. Ids above those of the tokenizer (rows that only the model has) are passed
            over.

    Raises:
        ConfigError: `kept` lacks tokens that the others need.
        UnsupportedModelError: a tokenizer that cannot be cut.
    """
    check_tokenizer(tokenizer)
    number = {old: new for new, old in enumerate(sorted(set(kept)))}
    missing = set(complete(tokenizer, number)) - number.keys()
    if missing:
        named = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(missing)[:5])))
        raise ConfigError(
            f"{len(missing)} tokens are not kept that the kept ones or the alphabet need, such as {named}. "
            "Pass complete(tokenizer, kept)."
        )
    spec = read_spec(tokenizer)
    _renumber(spec, number)
    wanted = Tokenizer.from_str(json.dumps(spec))
    expected = {token: number[old] for token, old in tokenizer.get_vocab().items() if old in number}
    if wanted.get_vocab(with_added_tokens=True) != expected:
        raise UnsupportedModelError(
            f"The ids of this {type(tokenizer).__name__} have gaps that cannot be closed in order. "
            "Remove the ids without a token from what is kept."
        )
    return _load(tokenizer, wanted)


def attempts(word: str, vocabulary: dict[str, int], prefix: str) -> set[int]:
    """The pieces that WordPiece matches in a word before it fails, or all if it does not."""
    pieces, start = set(), 0
    while start < len(word):
        lead = prefix if start else ""
        ends = range(len(word), start, -1)
        end = next((end for end in ends if lead + word[start:end] in vocabulary), None)
        if end is None:
            break
        pieces.add(vocabulary[lead + word[start:end]])
        start = end
    return pieces


def _wordpiece_needs(model: Spec, vocabulary: dict[str, int], needed: set[int]) -> set[int]:
    return {index for token, index in vocabulary.items() if _is_letter(token, model)}


def _unigram_needs(model: Spec, vocabulary: dict[str, int], needed: set[int]) -> set[int]:
    scores = [score for _, score in model["vocab"]]
    own = {scores.index(min(scores))} | ({model["unk_id"]} if model["unk_id"] is not None else set())
    return own | {index for token, index in vocabulary.items() if len(token) == 1 or token in BYTES}


def _bpe_needs(model: Spec, vocabulary: dict[str, int], needed: set[int]) -> set[int]:
    if model["byte_fallback"] and vocabulary.keys() >= BYTES:
        own = {vocabulary[token] for token in BYTES}  # any character can be spelled in bytes
    else:
        own = {index for token, index in vocabulary.items() if _is_letter(token, model)}
    ranks = {pair: rank for rank, pair in enumerate(_merges(model))}
    for token, index in vocabulary.items():
        if index in needed:
            own |= {vocabulary[part] for part in _derivation(token, ranks, model)}
    return own


def _is_letter(token: str, model: Spec) -> bool:
    """True for one character, with or without the mark that it begins no word or ends one."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    bare = token.removeprefix(prefix)
    return 1 in (len(token), len(bare), len(bare.removesuffix(suffix)), len(token.removesuffix(suffix)))


def _merges(model: Spec) -> list[tuple[str, str]]:
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]


def _derivation(token: str, ranks: dict[tuple[str, str], int], model: Spec) -> set[str]:
    """All that arises while BPE makes `token` of its characters; nothing if it never does (a special token)."""
    prefix, suffix = model["continuing_subword_prefix"] or "", model["end_of_word_suffix"] or ""
    bare = token.removeprefix(prefix)
    inside, end = (bare.removesuffix(suffix), suffix) if suffix and bare.endswith(suffix) else (bare, "")
    symbols = [prefix + letter for letter in inside]
    if not symbols:
        return set()
    symbols[0] = token[: len(token) - len(bare)] + inside[0]
    symbols[-1] += end
    arisen = set(symbols)
    while len(symbols) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), place) for place, pair in enumerate(pairwise(symbols)))
        if rank == len(ranks):
            break
        symbols[at : at + 2] = [_merged(symbols[at], symbols[at + 1], prefix)]
        arisen.add(symbols[at])
    return arisen if symbols == [token] else set()


def _merged(left: str, right: str, prefix: str) -> str:
    return left + right.removeprefix(prefix)


_NEEDS: dict[str, Callable[[Spec, dict[str, int], set[int]], set[int]]] = {
    "BPE": _bpe_needs,
    "Unigram": _unigram_needs,
    "WordPiece": _wordpiece_needs,
}


def _renumber(spec: Spec, number: dict[int, int]) -> None:
    """Cut the vocabulary of a tokenizer.json in place, and renumber all that names an id."""
    model = spec["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in number]
        model["unk_id"] = number.get(model["unk_id"])
    else:
        model["vocab"] = {token: number[index] for token, index in model["vocab"].items() if index in number}
    if model["type"] == "BPE":
        known, prefix = model["vocab"].keys(), model["continuing_subword_prefix"] or ""
        model["merges"] = [pair for pair in _merges(model) if {*pair, _merged(*pair, prefix)} <= known]
    for token in spec["added_tokens"]:
        token["id"] = number[token["id"]]
    if spec["padding"]:
        spec["padding"]["pad_id"] = number[spec["padding"]["pad_id"]]
    _renumber_processor(spec["post_processor"], number)


def _processor_ids(processor: Spec | None) -> set[int]:
    """The ids that a post-processor writes around a text."""
    kind = processor["type"] if processor else None
    if kind == "Sequence":
        return {index for part in processor["processors"] for index in _processor_ids(part)}
    if kind == "TemplateProcessing":
        return {index for special in processor["special_tokens"].values() for index in special["ids"]}
    return {processor["sep"][1], processor["cls"][1]} if kind in ("BertProcessing", "RobertaProcessing") else set()


def _renumber_processor(processor: Spec | None, number: dict[int, int]) -> None:
    kind = processor["type"] if processor else None
    if kind == "Sequence":
        for part in processor["processors"]:
            _renumber_processor(part, number)
    elif kind == "TemplateProcessing":
        for special in processor["special_tokens"].values():
            special["ids"] = [number[index] for index in special["ids"]]
    elif kind in ("BertProcessing", "RobertaProcessing"):
        for name in ("sep", "cls"):
            processor[name][1] = number[processor[name][1]]


def _load(tokenizer: PreTrainedTokenizerFast, wanted: Tokenizer) -> PreTrainedTokenizerFast:
    """Of the same class if that class makes `wanted` of its tokenizer.json, else of the plain one, which always does.

    A tokenizer keeps ids in many places; what is loaded from a folder has them all from its tokenizer.json.
    """
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        wanted.save(str(Path(folder) / "tokenizer.json"))
        for kind in (type(tokenizer), PreTrainedTokenizerFast):
            small = kind.from_pretrained(folder, local_files_only=True)
            if _parts(small.backend_tokenizer) == _parts(wanted) and small.get_vocab() == wanted.get_vocab():
                small.name_or_path = small.init_kwargs["name_or_path"] = tokenizer.name_or_path
                return small
    raise UnsupportedModelError(
        f"This {type(tokenizer).__name__} is not the same once it is saved and loaded. "
        "Save it, load it with AutoTokenizer.from_pretrained, and cut that one."
    )


def _parts(backend: Tokenizer) -> list[Any]:
    spec = json.loads(backend.to_str())
    return [spec[part] for part in _PARTS]
