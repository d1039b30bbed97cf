"""Reading, writing and the cache of two decoders side by side."""

import pytest
import torch

from hf_efficient import AttentionConfig, ConfigError, PruningConfig, UnsupportedModelError, convert_attention, prune
from hf_efficient.measurement import generation
from hf_efficient.measurement.generation import cache_bytes, measure_generation

from ..families import make_model
from ..gguf_files import WORDS, make_llama, make_tokenizer

SIZES = {"new_tokens": 3, "prompt_tokens": 8, "rounds": 2}


def test_what_the_cache_holds():
    """Of 2 layers, 2 key/value heads of 16 numbers of 4 bytes each, keys and values, 8 + 3 tokens of 2 rows."""
    llama = make_llama()
    made = measure_generation(llama, llama, make_tokenizer(), [], batch_size=2, **SIZES)
    assert made.teacher.cache_bytes == made.student.cache_bytes == 2 * 2 * 16 * 4 * 2 * (8 + 3) * 2
    assert made.new_tokens == 3 and made.prompt_tokens == 8 and made.rounds == 2
    assert min(made.teacher.prefill_ms, made.teacher.token_ms, made.student.prefill_ms, made.student.token_ms) > 0


def test_a_pruned_model_and_a_window_hold_less():
    llama = make_llama(max_position_embeddings=256)
    pruning = PruningConfig(ratio=0.4, granularity=("layer",), layer_importance="random")
    fewer = prune(llama, pruning, [{"input_ids": torch.arange(3, 19)[None]}])
    local = convert_attention(llama, AttentionConfig("local", window=4, global_tokens=0))
    sizes = SIZES | {"prompt_tokens": 64}
    for small in (fewer, local):
        made = measure_generation(llama, small, make_tokenizer(), [], **sizes)
        assert made.student.cache_bytes < made.teacher.cache_bytes


def test_storage_that_is_shared_counts_once():
    class Layer:
        def __init__(self, keys):
            self.keys, self.values, self.state = keys, keys[1:], [keys, torch.zeros(3)]

    class Cache:
        layers = (Layer(torch.zeros(4, 2)),)

    assert cache_bytes(Cache()) == 4 * 2 * 4 + 3 * 4


def test_what_they_write_and_which_drafts_are_taken():
    teacher, other, tokenizer = make_llama(), make_llama(seed=1), make_tokenizer()
    same = measure_generation(teacher, teacher, tokenizer, [WORDS, "the dogs"], **SIZES)
    assert same.acceptance == 1.0
    ids = tokenizer(WORDS, return_tensors="pt")["input_ids"]
    text = teacher.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
    assert same.samples[0].prompt == WORDS
    assert (
        same.samples[0].teacher == same.samples[0].student == tokenizer.decode(text, skip_special_tokens=True).strip()
    )
    unlike = measure_generation(teacher, other, tokenizer, [WORDS, "the dogs"], **SIZES | {"new_tokens": 20})
    assert unlike.acceptance < 1 and unlike.samples[0].teacher != unlike.samples[0].student


def test_a_draft_counts_where_the_student_would_have_written_it(monkeypatch):
    """Token by token, given what the teacher wrote before."""
    teacher, other, tokenizer = make_llama(), make_llama(seed=1), make_tokenizer()
    made = measure_generation(teacher, other, tokenizer, [WORDS], **SIZES | {"new_tokens": 12})
    ids = tokenizer(WORDS, return_tensors="pt")["input_ids"]
    whole = teacher.generate(ids, max_new_tokens=12, do_sample=False)
    start = ids.shape[1]
    right = [
        other(whole[:, :place]).logits[0, -1].argmax() == whole[0, place] for place in range(start, whole.shape[1])
    ]
    assert made.acceptance == pytest.approx(sum(map(bool, right)) / len(right))


def test_a_chat_model_is_asked_as_in_a_chat(monkeypatch):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %} dogs"
    seen = []
    monkeypatch.setattr(generation, "_written", lambda model, ids, count: seen.append(ids) or torch.tensor([5]))
    measure_generation(make_llama(), make_llama(), tokenizer, ["the cat"], **SIZES)
    assert tokenizer.decode(seen[0][0]) == "the cat dogs"


def test_mistakes():
    llama, tokenizer = make_llama(), make_tokenizer()
    with pytest.raises(ConfigError, match="new_tokens"):
        measure_generation(llama, llama, tokenizer, [], new_tokens=0)
    for odd in (make_model("bert"), make_model("t5")):
        with pytest.raises(UnsupportedModelError, match=r"student.*writes no text"):
            measure_generation(llama, odd, tokenizer, [])
