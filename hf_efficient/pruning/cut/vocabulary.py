"""Vocabulary pruning: a model without the tokens that its texts never use (Abdaoui et al. 2020, "Load What You Need").

    small, tokenizer = prune_vocabulary(model, tokenizer, texts)
    smaller, tokenizer = prune_vocabulary(model, tokenizer, texts, max_tokens=8000)

Nothing else changes: for each of the texts the new pair gives the logits of the old one. Where a multilingual model
serves one language or one domain, most of its parameters are rows of the embedding that nobody looks up. With
`max_tokens` the rare ones go too: words that had them are spelled in more pieces.
"""

import copy
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import overload

from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ...errors import ConfigError, DataError
from ...io.disk import check_empty, clear_disk_errors, new_folder
from ...io.tensors import write_tensors
from ...models.classes import block_of, stock_config
from ...models.on_disk import StoredModel, skeleton
from ...models.rebuild import check_model, class_for
from ...models.shards import in_portions, shard_paths, write_beside
from .tokenizer import attempts, check_tokenizer, complete, read_spec, trim_tokenizer
from .trimming import check_ids, named_tokens, trim, trim_embeddings, vocabulary_axes, vocabulary_rows

BATCH = 1024  # texts that are tokenised together


@overload
def prune_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    *,
    keep: Iterable[int] | None = None,
    max_tokens: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]: ...


@overload
def prune_vocabulary(
    model: str | os.PathLike,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    *,
    keep: Iterable[int] | None = None,
    max_tokens: int | None = None,
    output_dir: str | os.PathLike,
) -> tuple[Path, PreTrainedTokenizerFast]: ...


def prune_vocabulary(
    model: PreTrainedModel | str | os.PathLike,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    *,
    keep: Iterable[int] | None = None,
    max_tokens: int | None = None,
    output_dir: str | os.PathLike | None = None,
) -> tuple[PreTrainedModel | Path, PreTrainedTokenizerFast]:
    """A copy of `model` and of `tokenizer` with the tokens of `texts` only.

    Parameters:
        model: a stock or efficient model of a family in the table, with a vocabulary; or a folder with one, which is
            read and written a few tensors at a time.
        tokenizer: its tokenizer, a fast one (WordPiece, BPE or Unigram).
        texts: what the model is for, such as the training set; read once.
        keep: ids of further tokens that must stay.
        max_tokens: at most so many tokens stay, the most frequent of the texts. Texts with others are then cut in
            more pieces, and their logits change.
        output_dir: where the result of a folder is written, with the new tokenizer; new or empty.

    Returns:
        Model (of a folder: `output_dir`) and tokenizer. Special and added tokens, the alphabet (single characters or
        bytes) and the tokens that the config names stay as well, so that unseen texts can still be spelled, if in
        more pieces. Ids are new: data that was tokenised before must be tokenised again.

    Raises:
        DataError: `texts` is empty, or holds something else than strings.
        ConfigError: the tokenizer is not that of the model, `keep` names a token that the model does not have, or
            `max_tokens` is less than what must stay.
        UnsupportedModelError: a model without a vocabulary, or a tokenizer that is not fast.
    """
    if isinstance(model, str | os.PathLike):
        if output_dir is None:
            raise ConfigError(
                f"To prune the vocabulary of the model in {os.fspath(model)!r} say where the result goes: "
                "output_dir=... To have it in memory load it first, and give the model."
            )
        return _in_folder(model, tokenizer, texts, keep, max_tokens, output_dir)
    if output_dir is not None:
        raise ConfigError("output_dir is for a model that is named by its folder. Save this one: save_pretrained.")
    kept = kept_tokens(model, tokenizer, texts, keep, max_tokens)
    return trim_embeddings(model, kept), trim_tokenizer(tokenizer, kept)


def _in_folder(
    name: str | os.PathLike,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    keep: Iterable[int] | None,
    max_tokens: int | None,
    output_dir: str | os.PathLike,
) -> tuple[Path, PreTrainedTokenizerFast]:
    """The same from folder to folder, a few tensors at a time."""
    check_empty(output_dir)
    stored = StoredModel.open(os.fspath(name))
    kept = kept_tokens(stored.model, tokenizer, texts, keep, max_tokens)
    trimmed, short = trim(stored.model, kept), trim_tokenizer(tokenizer, kept)
    config = stock_config(trimmed.config) if block_of(trimmed.config).is_trivial() else trimmed.config
    small = skeleton(class_for(stored.model, config), config, stored.model.dtype)
    if small.can_generate():
        small.generation_config = copy.deepcopy(stored.model.generation_config)
        for field, value in trimmed.generation.items():
            setattr(small.generation_config, field, value)
    with clear_disk_errors(output_dir, "Then give the same call again."), new_folder(output_dir) as target:
        portions = in_portions(stored, stored.names())
        shards = shard_paths(target, len(portions))
        for shard, names in zip(shards, portions, strict=True):
            write_tensors(shard, {one: trimmed.cut(one, stored.read(one)) for one in names})
        short.save_pretrained(target)
        write_beside(small, stored.folder, target, shards, tokenizer=False)
    return Path(output_dir), short


def kept_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    keep: Iterable[int] | None = None,
    max_tokens: int | None = None,
) -> tuple[int, ...]:
    """The ids that `prune_vocabulary` keeps; the model may be without weights."""
    rows = vocabulary_rows(check_model(model))
    check_tokenizer(tokenizer)
    last = max(tokenizer.get_vocab().values())
    if last >= rows:
        raise ConfigError(
            f"The tokenizer has the id {last}, but the model has {rows} embeddings. Pass the model's own tokenizer; "
            "after adding tokens, call model.resize_token_embeddings(len(tokenizer)) first."
        )
    further = set(check_ids(keep or (), rows, "keep"))
    vocabulary_axes(model)
    counts, needed = count_tokens(tokenizer, texts), {*named_tokens(model), *further}
    if max_tokens is None:
        kept = complete(tokenizer, {*counts, *needed})
    else:
        kept = _most_frequent(tokenizer, counts, needed, max_tokens)
    return kept


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
