"""Decoders while they write: how long a prompt and each token take, what the cache holds, and what comes out.

    measure_generation(teacher, student, tokenizer, ["Once upon a time"], new_tokens=32, prompt_tokens=256)

A forward over a text says little of writing: there one token goes through the model at a time, and weights are read
more than multiplied. Teacher and student take turns, each with a cache of its own.
"""

import statistics
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError, check_positive
from ..models.inputs import dummy_inputs
from ..models.modes import evaluating, synchronize, using_threads
from ..reporting.language import Decoding, Generation, Sample

LONGEST = 256  # tokens of a prompt that is written on


def measure_generation(
    teacher: Any,
    student: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    student_tokenizer: Any = None,
    new_tokens: int = 32,
    prompt_tokens: int = 256,
    batch_size: int = 1,
    rounds: int = 5,
    threads: int | None = None,
) -> Generation:
    """Time both, and let both write.

    Parameters:
        tokenizer: of both, or of the teacher. One with a chat template gets each prompt as a user's message.
        student_tokenizer: where that is another one. What share of drafts is taken is unknown then.
        prompts: of which the likeliest tokens follow.
        new_tokens: so many are timed and written. prompt_tokens: of the timed prompt, made-up tokens.
        rounds: at least 1; the median counts. One more before them is not counted.

    Raises:
        ConfigError: a number that is not positive.
        UnsupportedModelError: one of the two writes no text.
    """
    sizes = {"new_tokens": new_tokens, "prompt_tokens": prompt_tokens, "batch_size": batch_size, "rounds": rounds}
    for name, value in sizes.items():
        check_positive(name, value)
    models = {"teacher": teacher, "student": student}
    tokenizers = {"teacher": tokenizer, "student": student_tokenizer or tokenizer}
    for name, model in models.items():
        if not model.can_generate() or model.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"The {name} ({type(model).__name__}) is no decoder with a head for language: it writes no text. "
                "Leave new_tokens out."
            )
    with evaluating(*models.values()), using_threads(threads):
        ids = {name: dummy_inputs(model, batch_size, prompt_tokens)["input_ids"] for name, model in models.items()}
        decodings = time_decoding(models, ids, new_tokens, rounds)
        written, accepted, total = [], 0, 0
        for prompt in prompts:
            ids = {name: _as_asked(each, prompt).to(teacher.device) for name, each in tokenizers.items()}
            texts = {name: _written(model, ids[name], new_tokens) for name, model in models.items()}
            if student_tokenizer is None:
                agreed = _would_write(student, ids["teacher"], texts["teacher"])
                accepted, total = accepted + int(agreed.sum()), total + len(agreed)
            plain = {name: tokenizers[name].decode(text, skip_special_tokens=True) for name, text in texts.items()}
            written.append(Sample(prompt, plain["teacher"].strip(), plain["student"].strip()))
    acceptance = accepted / max(total, 1) if student_tokenizer is None else None
    return Generation(
        teacher=decodings["teacher"],
        student=decodings["student"],
        new_tokens=new_tokens,
        prompt_tokens=prompt_tokens,
        batch_size=batch_size,
        rounds=rounds,
        acceptance=acceptance,
        samples=tuple(written),
    )


def time_decoding(models: dict[str, Any], ids: dict[str, Tensor], count: int, rounds: int) -> dict[str, Decoding]:
    """Each reads its prompt `[B, T]` and writes `count` tokens after it, in turn; medians of `rounds`, without a first
    one that is not counted. In inference mode."""
    prefill: dict[str, list[float]] = {name: [] for name in models}
    token: dict[str, list[float]] = {name: [] for name in models}
    held = {}
    for _ in range(rounds + 1):
        for name, model in models.items():
            first, each, cache = _decode(model, ids[name], count)
            prefill[name].append(first)
            token[name].append(each)
            held[name] = cache_bytes(cache)
    return {
        name: Decoding(
            1e3 * statistics.median(prefill[name][1:]), 1e3 * statistics.median(token[name][1:]), held[name]
        )
        for name in models
    }


def _decode(model: Any, ids: Tensor, count: int) -> tuple[float, float, Any]:
    """Seconds of the prompt `[B, T]`, seconds of each token after it, and the cache."""
    synchronize(ids.device)
    start = perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    synchronize(ids.device)
    middle = perf_counter()
    for _ in range(count):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    synchronize(ids.device)
    return middle - start, (perf_counter() - middle) / count, out.past_key_values


def cache_bytes(cache: Any) -> int:
    """Of the storage behind all tensors that the layers of a cache hold, each counted once; the cache of an exported
    decoder is a dict of them."""
    storages = {}
    waiting = list(cache.values()) if isinstance(cache, dict) else [vars(layer) for layer in cache.layers]
    while waiting:
        for value in waiting.pop().values():
            if isinstance(value, Tensor):
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            elif isinstance(value, (list, tuple)):
                waiting.append(dict(enumerate(value)))
    return sum(storages.values())


def _as_asked(tokenizer: Any, prompt: str) -> Tensor:
    """`[1, T]`, the end of a long prompt left out."""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    return tokenizer(prompt, return_tensors="pt", truncation=True, max_length=LONGEST)["input_ids"]


def _written(model: Any, ids: Tensor, count: int) -> Tensor:
    """The likeliest tokens after a prompt, up to and with the end."""
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :]


def _would_write(model: Any, ids: Tensor, text: Tensor) -> Tensor:
    """Of each token of a text after a prompt: is it what the model finds likeliest there?"""
    whole = torch.cat([ids[0], text])[None]
    likeliest = model(input_ids=whole).logits[0, ids.shape[1] - 1 : -1].argmax(-1)
    return likeliest == text
