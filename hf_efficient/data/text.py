"""From texts to tokens, a task at a time: each function takes a batch of rows and gives model inputs.

    rows.map(classify, batched=True, with_indices=True, fn_kwargs={"columns": {"text": "review", ...}, ...})

`columns`: the column of each role; `ids`: the number of each label. Nothing here changes the tokenizer.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, DataError

IGNORED = -100
MASKED = 0.15  # of the tokens, as BERT was trained (Devlin et al. 2019)
FAR = 1000  # characters for each token that is kept; no token is made of so many
NO_ANSWER = 0  # the position of an answer that is not in the text: the first token, [CLS]


def classify(batch: dict, indices: list[int], *, columns: dict, ids: dict, tokenizer: Any, max_length: int) -> dict:
    texts = [strings(batch, indices, columns[role]) for role in ("text", "text_pair") if role in columns]
    labels = [ids[value] for value in batch[columns["label"]]]
    if len(texts) == 1:
        return _truncated(tokenizer, max_length, text=texts[0]) | {"labels": labels}
    return dict(tokenizer(*texts, truncation=True, max_length=max_length)) | {"labels": labels}


def translate(batch: dict, indices: list[int], *, columns: dict, ids: dict, tokenizer: Any, max_length: int) -> dict:
    sources, targets = (strings(batch, indices, columns[role]) for role in ("text", "target"))
    labels = _truncated(tokenizer, max_length, text_target=targets)["input_ids"]
    return _truncated(tokenizer, max_length, text=sources) | {"labels": labels}


def continue_text(
    batch: dict, indices: list[int], *, columns: dict, ids: dict, tokenizer: Any, max_length: int
) -> dict:
    blocks = _pack(batch, indices, columns["text"], tokenizer, max_length)
    return _attended(blocks) | {"labels": [list(block) for block in blocks]}


def fill(batch: dict, indices: list[int], *, columns: dict, ids: dict, tokenizer: Any, max_length: int) -> dict:
    """Without masks, which `Masking` draws."""
    return _attended(_pack(batch, indices, columns["text"], tokenizer, max_length))


def fill_test(batch: dict, indices: list[int], *, columns: dict, ids: dict, tokenizer: Any, max_length: int) -> dict:
    """With masks drawn once, the same for every model and batch size."""
    import torch

    blocks = _pack(batch, indices, columns["text"], tokenizer, max_length)
    masking = _masking(tokenizer)
    masking.generator = torch.Generator().manual_seed(indices[0])
    masked = [masking.torch_mask_tokens(torch.tensor([block])) for block in blocks]
    ids_of_blocks, labels = ([pair[side][0].tolist() for pair in masked] for side in (0, 1))
    return _attended(ids_of_blocks) | {"labels": labels}


def embed(batch: dict, indices: list[int], *, columns: dict, ids: dict, tokenizer: Any, max_length: int) -> dict:
    """Each text of a pair is a row of its own; blank ones are left out."""
    sides = [strings(batch, indices, columns[role]) for role in ("text", "text_pair") if role in columns]
    texts = [text for row in zip(*sides, strict=True) for text in row if text.strip()]
    return _truncated(tokenizer, max_length, text=texts)


def embed_test(batch: dict, indices: list[int], *, columns: dict, ids: dict, tokenizer: Any, max_length: int) -> dict:
    """Two rows with the same number `pair` for each pair, and with how alike it is, where that is said; without a
    column of pairs the two halves of each text."""
    texts = strings(batch, indices, columns["text"])
    if "text_pair" in columns:
        rows = list(zip(texts, strings(batch, indices, columns["text_pair"]), strict=True))
    else:
        middles = [len(text) // 2 for text in texts]  # cut at the first space behind it or, without one, there
        cuts = [max(text.find(" ", middle), middle) for text, middle in zip(texts, middles, strict=True)]
        rows = [(text[:cut], text[cut:]) for text, cut in zip(texts, cuts, strict=True)]
    kept = [number for number, row in enumerate(rows) if row[0].strip() and row[1].strip()]
    pairs = [(indices[number], rows[number]) for number in kept]
    inputs = dict(tokenizer([text for _, row in pairs for text in row], truncation=True, max_length=max_length))
    if "label" in columns:
        labels = batch[columns["label"]]
        inputs |= {"similarity": [labels[number] for number in kept for _ in rows[number]]}
    return inputs | {"pair": [index for index, row in pairs for _ in row]}


def score(batch: dict, indices: list[int], *, columns: dict, ids: dict, tokenizer: Any, max_length: int) -> dict:
    """Pairs of query and document, with how much the one tells of the other; `ids` is not needed."""
    queries, documents = (strings(batch, indices, columns[role]) for role in ("text", "text_pair"))
    inputs = dict(tokenizer(queries, documents, truncation=True, max_length=max_length))
    return inputs | {"labels": [[value] for value in batch[columns["label"]]]}


def score_test(batch: dict, indices: list[int], *, columns: dict, ids: dict, tokenizer: Any, max_length: int) -> dict:
    """And whose candidate the document is: `ids` numbers the queries."""
    inputs = score(batch, indices, columns=columns, ids=ids, tokenizer=tokenizer, max_length=max_length)
    return inputs | {"query": [ids[query] for query in batch[columns["text"]]]}


def tag(batch: dict, indices: list[int], *, columns: dict, ids: dict, tokenizer: Any, max_length: int) -> dict:
    """The words, joined by spaces; the first token of each carries its label. Rows without words are left out."""
    words, tags = batch[columns["tokens"]], batch[columns["label"]]
    for index, sentence, marks in zip(indices, words, tags, strict=True):
        if not isinstance(sentence, list) or not all(isinstance(word, str) for word in sentence):
            raise DataError(
                f"Row {index} has {sentence!r:.100} in the column {columns['tokens']!r}, where a list of words is "
                "needed."
            )
        if marks is None or len(sentence) != len(marks):
            count = "no" if marks is None else len(marks)
            raise DataError(
                f"Row {index} has {len(sentence)} words in column {columns['tokens']!r} and {count} labels in "
                f"{columns['label']!r}: each word needs one."
            )
    rows = [(sentence, [ids[mark] for mark in marks]) for sentence, marks in zip(words, tags, strict=True) if sentence]
    texts = [" ".join(sentence) for sentence, _ in rows]
    inputs = dict(tokenizer(texts, truncation=True, max_length=max_length, return_offsets_mapping=True))
    offsets = inputs.pop("offset_mapping")
    labels = [_labels(sentence, numbers, spans) for (sentence, numbers), spans in zip(rows, offsets, strict=True)]
    return inputs | {"labels": labels}


def answer(batch: dict, indices: list[int], *, columns: dict, ids: dict, tokenizer: Any, max_length: int) -> dict:
    """The first and the last token of the first answer; `NO_ANSWER` where there is none, or it was cut away."""
    questions, contexts = (strings(batch, indices, columns[role]) for role in ("question", "context"))
    options = {"truncation": "only_second", "max_length": max_length, "return_offsets_mapping": True}
    try:
        encoded = tokenizer(questions, contexts, **options)
    except Exception as error:  # the tokenizers raise a bare Exception
        raise DataError(
            f"max_length={max_length} leaves no room for a context behind one of the questions ({error}). Give a "
            "larger one."
        ) from error
    inputs = {name: values for name, values in encoded.items() if name != "offset_mapping"}
    ends = []
    for row, (index, answers) in enumerate(zip(indices, batch[columns["answers"]], strict=True)):
        span = _first_answer(answers, contexts[row], index, columns["answers"])
        inside = [part == 1 for part in encoded.sequence_ids(row)]
        ends.append(_span_of_tokens(span, encoded["offset_mapping"][row], inside))
    return inputs | {"start_positions": [start for start, _ in ends], "end_positions": [end for _, end in ends]}


def pad_inputs(processor: Any) -> Callable:
    import transformers

    return transformers.DataCollatorWithPadding(processor)


def pad_labels(processor: Any) -> Callable:
    """With -100 by position, so that a padding token which is also end-of-sequence still counts."""
    import transformers

    return transformers.DataCollatorForSeq2Seq(processor)


def mask_anew(processor: Any) -> Callable:
    return Masking(_masking(processor), pad_labels(processor))


@dataclass
class Masking:
    """Draws masks for samples without labels; samples that were masked before are only padded.

    What is drawn depends on the samples of the batch alone: shuffled, a text has other masks in each epoch, and a run
    that is resumed in the middle of one has the masks of the uninterrupted run.
    """

    mask: Any
    pad: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        if "labels" in samples[0]:
            return self.pad(samples)
        content = repr([torch.as_tensor(sample["input_ids"]).tolist() for sample in samples]).encode()
        self.mask.generator = torch.Generator().manual_seed(zlib.crc32(content))
        return self.mask(samples)


def check_tokenizer(task: str, needs: Collection[str], tokenizer: Any) -> None:
    """ConfigError for no mask token, no character offsets, or padding on the left, which would shift the answers."""
    if "mask_token" in needs and tokenizer.mask_token is None:
        raise ConfigError(f"{task} needs a tokenizer with a mask token; this one has none. See task causal-lm.")
    if "offsets" in needs and not tokenizer.is_fast:
        raise ConfigError(f"{task} needs a fast tokenizer, which says where in the text each token is.")
    if "right_padding" in needs and tokenizer.padding_side != "right":
        raise ConfigError(f"{task} counts positions from the left: set tokenizer.padding_side='right'.")


def _masking(tokenizer: Any) -> Any:
    import transformers

    return transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED)


def _truncated(tokenizer: Any, max_length: int, **texts: list[str]) -> dict[str, Any]:
    """The first tokens of each text. Of one that is far too long the head alone is read: 10 MB would take a minute."""
    options: dict[str, Any] = {"truncation": True, "max_length": max_length}
    [(argument, whole)] = texts.items()
    far = FAR * max_length
    long = [row for row, text in enumerate(whole) if len(text) > far and tokenizer.truncation_side == "right"]
    heads = list(whole)
    for row in long:
        heads[row] = whole[row][:far].rsplit(None, 1)[0] if whole[row][:far].strip() else ""
    inputs = dict(tokenizer(**{argument: heads}, **options))
    if all(len(inputs["input_ids"][row]) >= max_length for row in long):
        return inputs
    return dict(tokenizer(**{argument: whole}, **options))  # a head of spaces, or of what gives no tokens


def _pack(batch: dict, indices: list[int], column: str, tokenizer: Any, max_length: int) -> list[list[int]]:
    """The documents joined, each closed by the end-of-sequence token if there is one, cut into blocks."""
    tokens: list[int] = []
    for text in strings(batch, indices, column):
        document = tokenizer(text, verbose=False)["input_ids"] if text.strip() else []
        ends = tokenizer.eos_token_id is None or not document or document[-1] == tokenizer.eos_token_id
        tokens += document if ends else [*document, tokenizer.eos_token_id]
    blocks = [tokens[start : start + max_length] for start in range(0, len(tokens), max_length)]
    return [block for block in blocks if len(block) > 1]  # one token predicts nothing


def _attended(blocks: list[list[int]]) -> dict[str, list]:
    return {"input_ids": blocks, "attention_mask": [[1] * len(block) for block in blocks]}


def _labels(words: list[str], numbers: list[int], spans: list[tuple[int, int]]) -> list[int]:
    """A label for each token, by its characters in the joined words; a special token has none (its span is empty)."""
    starts, place = [], 0
    for word in words:
        starts.append(place)
        place += len(word) + 1
    labels, next_word = [IGNORED] * len(spans), 0
    for token, (start, end) in enumerate(spans):
        if start == end or next_word == len(words) or starts[next_word] >= end:
            continue
        labels[token] = numbers[next_word]
        while next_word < len(words) and starts[next_word] < end:  # a token may reach into the next word
            next_word += 1
    return labels


def _first_answer(answers: Any, context: str, index: int, column: str) -> tuple[int, int] | None:
    """Characters of the context, from and to (excluded)."""
    if not isinstance(answers, dict) or not {"text", "answer_start"} <= answers.keys():
        raise DataError(
            f"Row {index} has {answers!r:.100} in the column {column!r}, where the layout of SQuAD is needed: "
            '{"text": ["an answer"], "answer_start": [10]}.'
        )
    texts, starts = (
        [each] if isinstance(each, str | int) else each for each in (answers["text"], answers["answer_start"])
    )
    if not texts:
        return None
    end = starts[0] + len(texts[0])
    if starts[0] < 0 or end > len(context):
        raise DataError(f"Row {index}: the answer {texts[0]!r:.60} at {starts[0]} lies outside of its context.")
    return starts[0], end


def _span_of_tokens(
    span: tuple[int, int] | None, offsets: list[tuple[int, int]], inside: list[bool]
) -> tuple[int, int]:
    """The first and the last token that share characters with the span, if the text was not cut before its end."""
    if span is None:
        return NO_ANSWER, NO_ANSWER
    tokens = [token for token, is_context in enumerate(inside) if is_context]
    if not tokens or offsets[tokens[-1]][1] < span[1]:
        return NO_ANSWER, NO_ANSWER
    shared = [token for token in tokens if offsets[token][0] < span[1] and offsets[token][1] > span[0]]
    return (shared[0], shared[-1]) if shared else (NO_ANSWER, NO_ANSWER)


def strings(batch: dict, indices: list[int], column: str) -> list[str]:
    """The texts of a column; DataError for a row that has none."""
    for index, value in zip(indices, batch[column], strict=True):
        if not isinstance(value, str):
            raise DataError(f"Row {index} has {value!r} in the text column {column!r}, where a string is needed.")
    return batch[column]
