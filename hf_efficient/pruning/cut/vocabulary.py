"""Vocabulary pruning: a model without the tokens that its texts never use (Abdaoui et al. 2020, "Load What You Need").

    small, tokenizer = prune_vocabulary(model, tokenizer, texts)
    smaller, tokenizer = prune_vocabulary(model, tokenizer, texts, max_tokens=8000)

Nothing else changes: for each of the texts the new pair gives the logits of the old one. Where a multilingual model
serves one language or one domain, most of its parameters are rows of the embedding that nobody looks up. With
`max_tokens` the rare ones go too: words that had them are spelled in more pieces.

Which tensors have a row for each token is not listed anywhere: they are those whose shape changes when the class is
built, without memory, for one token more.
"""

import copy
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from ...errors import ConfigError, DataError, UnsupportedModelError
from ...models.anatomy import Anatomy
from ...models.classes import with_block
from ...models.family import Family
from ...models.rebuild import check_model, rebuild
from .tokenizer import attempts, check_tokenizer, complete, read_spec, trim_tokenizer

BATCH = 1024  # texts that are tokenised together

_SIZES = ("vocab_size", "decoder_vocab_size")
_ID_TABLES = ("lang_to_id", "task_to_id")  # of Whisper
_FORBIDDEN = ("suppress_tokens", "begin_suppress_tokens")  # what is gone needs no suppressing


def prune_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    *,
    keep: Iterable[int] | None = None,
    max_tokens: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A copy of `model` and of `tokenizer` with the tokens of `texts` only.

    Parameters:
        model: a stock or efficient model of a family in the table, with a vocabulary.
        tokenizer: its tokenizer, a fast one (WordPiece, BPE or Unigram).
        texts: what the model is for, such as the training set; read once.
        keep: ids of further tokens that must stay.
        max_tokens: at most so many tokens stay, the most frequent of the texts. Texts with others are then cut in
            more pieces, and their logits change.

    Returns:
        Model and tokenizer. Special and added tokens, the alphabet (single characters or bytes) and the tokens that
        the config names stay as well, so that unseen texts can still be spelled, if in more pieces. Ids are new:
        data that was tokenised before must be tokenised again.

    Raises:
        DataError: `texts` is empty, or holds something else than strings.
        ConfigError: the tokenizer is not that of the model, `keep` names a token that the model does not have, or
            `max_tokens` is less than what must stay.
        UnsupportedModelError: a model without a vocabulary, or a tokenizer that is not fast.
    """
    rows = _rows(check_model(model))
    check_tokenizer(tokenizer)
    last = max(tokenizer.get_vocab().values())
    if last >= rows:
        raise ConfigError(
            f"The tokenizer has the id {last}, but the model has {rows} embeddings. Pass the model's own tokenizer; "
            "after adding tokens, call model.resize_token_embeddings(len(tokenizer)) first."
        )
    further = set(_check_ids(keep or (), rows, "keep"))
    _vocabulary_axes(model)
    counts, needed = count_tokens(tokenizer, texts), {*named_tokens(model), *further}
    if max_tokens is None:
        kept = complete(tokenizer, {*counts, *needed})
    else:
        kept = _most_frequent(tokenizer, counts, needed, max_tokens)
    return trim_embeddings(model, kept), trim_tokenizer(tokenizer, kept)


def used_tokens(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> tuple[int, ...]:
    """The ids in `texts`, and those that a tokenizer with them cannot do without, in rising order.

    Raises:
        DataError: `texts` is empty, or holds something else than strings.
        UnsupportedModelError: the tokenizer is not fast.
    """
    return complete(tokenizer, count_tokens(tokenizer, texts))


def count_tokens(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Counter[int]:
    """How often each id stands in `texts`; 0 for the pieces that an unknown word was tried with.

    Raises:
        DataError: `texts` is empty, or holds something else than strings.
        UnsupportedModelError: the tokenizer is not fast.
    """
    backend = Tokenizer.from_str(check_tokenizer(tokenizer).backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    model = read_spec(tokenizer)["model"]
    counts: Counter[int] = Counter()
    for batch in _batches(texts):
        for text, encoding in zip(batch, backend.encode_batch(batch), strict=True):
            counts.update(encoding.ids)
            if model["type"] == "WordPiece" and model["unk_token"] in encoding.tokens:
                places = zip(encoding.tokens, encoding.offsets, strict=True)
                for start, end in (span for token, span in places if token == model["unk_token"]):
                    words = (
                        backend.normalizer.normalize_str(text[start:end]) if backend.normalizer else text[start:end]
                    )
                    for word in words.split():
                        tried = attempts(word, model["vocab"], model["continuing_subword_prefix"])
                        counts.update(dict.fromkeys(tried, 0))
    return counts


def _most_frequent(
    tokenizer: PreTrainedTokenizerFast, counts: Counter[int], needed: set[int], limit: int
) -> tuple[int, ...]:
    """As many of the counted ids as fit, the most frequent first, with all that must stay beside them."""
    if type(limit) is not int or limit < 1:
        raise ConfigError(f"max_tokens must be an integer of 1 or more, or None, got {limit!r}.")
    least = len(complete(tokenizer, needed))
    if limit < least:
        raise ConfigError(
            f"max_tokens is {limit}, but {least} tokens must stay: special and added tokens, the alphabet, and what "
            f"the config names. Give {least} or more."
        )
    ranked = sorted(counts, key=lambda index: (-counts[index], index))
    # What a token needs beside it (BPE) comes along, so the first that no longer fits is searched for.
    fits = bisect_right(range(len(ranked)), limit, key=lambda n: len(complete(tokenizer, {*ranked[: n + 1], *needed})))
    return complete(tokenizer, {*ranked[:fits], *needed})


def trim_embeddings(model: PreTrainedModel, kept: Iterable[int]) -> PreTrainedModel:
    """A copy of `model` with the embeddings and output rows of `kept` only, renumbered 0..n-1 in their old order.

    Raises:
        ConfigError: an id that the model does not have, or one missing that its config names.
        UnsupportedModelError: a model without a vocabulary, or with one for each side.
    """
    anatomy = Anatomy.of(check_model(model))
    rows, family = _rows(model), anatomy.family
    axes = _vocabulary_axes(model)
    ids = _check_ids(kept, rows, "kept")
    number = {old: new for new, old in enumerate(ids)}
    missing = {index: name for index, name in named_tokens(model).items() if index not in number}
    if missing:
        index, name = next(iter(missing.items()))
        raise ConfigError(
            f"{len(missing)} tokens are not kept that the model's config names, such as {index} ({name}). "
            "Add named_tokens(model) to what is kept."
        )
    state = model.state_dict()
    for key, axis in axes.items():
        state[key] = state[key].index_select(axis, torch.tensor(ids, device=state[key].device))
    own = _own_fields(model.config)
    fields = _renumbered(own, number, rows) | {name: len(ids) for name in _SIZES if name in own}
    if _reads_highest_id(family, own):
        del fields["eos_token_id"]
    elif family.model_type.startswith("clip") and fields["eos_token_id"] == 2:
        raise ConfigError(
            "The end token of a CLIP model must not get the id 2, which has a meaning of its own there. "
            f"Keep one more token before {own['eos_token_id']}."
        )
    if family.positions_after_pad:
        fields |= _move_positions(state, model, family, own["pad_token_id"] - fields["pad_token_id"])
    if own.keys() != model.config.to_dict().keys():
        fields = {"text_config": own | fields}
    small = rebuild(model, with_block(model.config, anatomy.block, **fields), state)
    if model.can_generate():
        for name, value in _renumbered(model.generation_config.to_dict(), number, rows).items():
            setattr(small.generation_config, name, value)
    return small


def named_tokens(model: PreTrainedModel) -> dict[int, str]:
    """The ids that config and generation config name, each with a field that does: none of them can go."""
    rows, named = _rows(model), {}
    reads_highest = _reads_highest_id(Anatomy.of(model).family, _own_fields(model.config))
    for fields in (_own_fields(model.config), model.generation_config.to_dict() if model.can_generate() else {}):
        for name, value in fields.items():
            if name != "eos_token_id" or not reads_highest:
                named |= dict.fromkeys(_ids_in(name, value), name)
        first = fields.get("no_timestamps_token_id")
        if first is not None:  # Whisper counts its timestamps from here to the end
            named |= dict.fromkeys(range(first, rows), "timestamps")
    return {index: name for index, name in sorted(named.items()) if 0 <= index < rows}


def _ids_in(name: str, value: Any) -> list[int]:
    """The ids in a config field that must stay."""
    if value is None:
        return []
    if name.endswith("_token_id"):
        return list(value) if isinstance(value, list | tuple) else [value]
    if name in _ID_TABLES:
        return list(value.values())
    return [index for _, index in value if index is not None] if name == "forced_decoder_ids" else []


def _renumbered(fields: dict[str, Any], number: dict[int, int], rows: int) -> dict[str, Any]:
    """The fields that name tokens, with their new ids. Bans and biases of tokens that are gone are gone too; numbers
    that were no token (-1) stay."""

    def new(index: int | None) -> int | None:
        return number[index] if index is not None and 0 <= index < rows else index

    changed: dict[str, Any] = {}
    for name, value in fields.items():
        if value is None:
            continue
        if name.endswith("_token_id"):
            changed[name] = [new(index) for index in value] if isinstance(value, list | tuple) else new(value)
        elif name in _ID_TABLES:
            changed[name] = {key: new(index) for key, index in value.items()}
        elif name == "forced_decoder_ids":
            changed[name] = [[place, new(index)] for place, index in value]
        elif name in _FORBIDDEN:
            changed[name] = [number[index] for index in value if index in number] or None
        elif name == "bad_words_ids":
            words = [[number[index] for index in word] for word in value if number.keys() >= set(word)]
            changed[name] = words or None
        elif name == "sequence_bias":
            pairs = value.items() if isinstance(value, dict) else value
            left = [([number[index] for index in word], bias) for word, bias in pairs if number.keys() >= set(word)]
            changed[name] = [[word, bias] for word, bias in left] or None
    return changed


def _own_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of the (sub-)config that has the vocabulary; UnsupportedModelError if none has."""
    fields = config.to_dict()
    own = fields.get("text_config", fields)
    if "vocab_size" not in own:
        raise UnsupportedModelError(
            f"Models of type {config.model_type!r} read no text, so there is no vocabulary to prune. "
            "Prune heads, neurons or layers instead."
        )
    return own


def _rows(model: PreTrainedModel) -> int:
    """How many tokens the model has embeddings for; often more than its tokenizer knows."""
    own = _own_fields(model.config)
    if own.get("decoder_vocab_size", own["vocab_size"]) != own["vocab_size"]:
        raise UnsupportedModelError(
            f"This model reads {own['vocab_size']} tokens and writes {own['decoder_vocab_size']} others. "
            "Only models with one vocabulary for both sides can be pruned."
        )
    return own["vocab_size"]


def _vocabulary_axes(model: PreTrainedModel) -> dict[str, int]:
    """The tensors of the state dict that have an entry for each token, and on which axis."""
    config = copy.deepcopy(model.config)
    own = config.text_config if "text_config" in config.to_dict() else config
    for name in _SIZES:
        if name in _own_fields(config):
            setattr(own, name, _rows(model) + 1)
    with torch.device("meta"):
        larger = type(model)(config).state_dict()
    axes = {}
    for key, value in model.state_dict().items():
        grown = [axis for axis, size in enumerate(larger[key].shape) if size != value.shape[axis]]
        if grown:
            axes[key] = grown[0]
    if not axes:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no embeddings of tokens, so there is nothing to prune."
        )
    return axes


def _reads_highest_id(family: Family, fields: dict[str, Any]) -> bool:
    """True for CLIP models whose config says 2: they take the token with the highest id for the end of the text."""
    return family.model_type.startswith("clip") and fields["eos_token_id"] == 2


def _move_positions(state: dict, model: PreTrainedModel, family: Family, shift: int) -> dict[str, int]:
    """Where positions are counted from the padding token (RoBERTa), the tables move with it. Returns config fields."""
    for path in family.positions:
        table = model.base_model.get_submodule(path)
        key = next(name for name, module in model.named_modules() if module is table)
        state[f"{key}.weight"] = state[f"{key}.weight"][shift:]
    assert family.max_positions
    return {family.max_positions: getattr(model.config, family.max_positions) - shift}


def _check_ids(ids: Iterable[int], rows: int, name: str) -> list[int]:
    chosen = set(ids)
    strange = [index for index in chosen if type(index) is not int or not 0 <= index < rows]
    if strange:
        raise ConfigError(f"{name} names {strange[0]!r}; the model has the token ids 0 to {rows - 1}.")
    return sorted(chosen)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    if isinstance(texts, str | bytes):
        raise DataError("`texts` is one string, and would be read letter by letter. Pass a list: [text].")
    rest, count = iter(texts), 0
    while batch := list(islice(rest, BATCH)):
        for place, text in enumerate(batch, count):
            if not isinstance(text, str):
                raise DataError(
                    f"Text {place} is a {type(text).__name__}, but `texts` must be strings. "
                    'Pass one column of a data set: data["text"].'
                )
        count += len(batch)
        yield batch
    if not count:
        raise DataError("`texts` is empty: nothing would be left. Pass the texts that the model is for.")
