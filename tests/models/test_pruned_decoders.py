"""Pruned Llamas are citizens: what people do with a decoder they do with these, stock class or not.

`portable` is a stock Llama of fewer neurons and heads, `plugin` has layers of unequal sizes.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, StaticCache, TextIteratorStreamer

import hf_efficient
from hf_efficient import ConfigError, PruningConfig, prune, quantize
from hf_efficient.runtimes.quantization import check_groups

from ..gguf_files import TEMPLATE, WORDS, make_llama, make_tokenizer

ALLOCATIONS = {"portable": "uniform", "plugin": "global"}
CHAT = [{"role": "user", "content": WORDS}]


def shrunk(kind, **changes):
    model = make_llama(intermediate_size=128, max_position_embeddings=128)
    torch.manual_seed(0)
    ids = torch.randint(3, 280, (4, 16))
    options = {"ratio": 0.4, "round_to": 32, "reconstruct": False, "allocation": ALLOCATIONS[kind]} | changes
    return prune(model, PruningConfig(**options), [{"input_ids": ids, "labels": ids}]).eval()


@pytest.fixture(params=ALLOCATIONS, scope="module")
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def small(kind, tmp_path_factory):
    """As somebody receives it: from its folder."""
    folder = tmp_path_factory.mktemp(kind)
    model, tokenizer = shrunk(kind), make_tokenizer()
    assert (type(model) is LlamaForCausalLM) == (kind == "portable")
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(small):
    return AutoTokenizer.from_pretrained(small.name_or_path)


@pytest.fixture
def prompt(tokenizer):
    return tokenizer.apply_chat_template(CHAT, return_tensors="pt", return_dict=True)


def greedy(model, inputs, count=10, **options):
    return model.generate(**inputs, max_new_tokens=count, do_sample=False, **options)


def test_the_chat_template_comes_along(tokenizer):
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == f"<user>{WORDS}"


def test_a_stream_is_the_text(small, tokenizer, prompt):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    whole = greedy(small, prompt, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(whole[0, prompt["input_ids"].shape[1] :])


def test_rows_that_are_padded_on_the_left_continue_as_alone(small, tokenizer):
    tokenizer.padding_side = "left"
    texts = [WORDS, "the cat"]
    both = greedy(small, tokenizer(texts, padding=True, return_tensors="pt"))
    for row, text in zip(both, texts, strict=True):
        alone = greedy(small, tokenizer(text, return_tensors="pt"))[0]
        assert row[-10:].tolist() == alone[-10:].tolist()


def test_beams_with_a_cache_and_without(small, prompt):
    with_cache, without = (greedy(small, prompt, num_beams=3, use_cache=cached) for cached in (True, False))
    assert torch.equal(with_cache, without)


def test_a_static_cache(small, prompt):
    room = prompt["input_ids"].shape[1] + 10
    cache = StaticCache(config=small.config, max_cache_len=room)
    assert torch.equal(greedy(small, prompt, past_key_values=cache), greedy(small, prompt))


def test_as_a_draft_its_teacher_writes_what_it_would_alone(small, prompt):
    teacher = make_llama(intermediate_size=128, max_position_embeddings=128)
    alone = greedy(teacher, prompt)
    assert not torch.equal(greedy(small, prompt), alone)
    assert torch.equal(greedy(teacher, prompt, assistant_model=small), alone)


def test_lora_on_it_trains_and_merges(small, prompt, tmp_path):
    import copy

    from peft import LoraConfig, PeftModel, get_peft_model

    base = copy.deepcopy(small)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    learned = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(learned, lr=1e-2), []
    for _ in range(5):
        losses.append(adapted(**prompt, labels=prompt["input_ids"]).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])}
    assert losses[-1] < losses[0] and changed and all("lora_" in name for name in changed)
    expected = adapted(**prompt).logits
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(small), tmp_path)
    torch.testing.assert_close(again(**prompt).logits, expected)
    torch.testing.assert_close(again.merge_and_unload()(**prompt).logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(small(**prompt).logits, expected)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_fewer_bits_with_groups_that_fit(kind, method, tmp_path):
    pytest.importorskip("torchao")
    model = shrunk(kind, granularity=("neuron",))  # heads of 16 do not fit groups of 32
    ids = torch.randint(3, 280, (1, 16))
    few = quantize(model, method)
    few.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, few(ids).logits) and not torch.equal(few(ids).logits, model(ids).logits)


def test_groups_that_do_not_fit_are_told(kind):
    pytest.importorskip("torchao")
    with pytest.raises(ConfigError, match="round_to=64"):
        check_groups(shrunk(kind, granularity=("neuron",), round_to=8, ratio=0.2), 64)


def test_a_portable_result_keeps_the_rules_of_other_loaders(tmp_path):
    """vLLM and its like take a stock architecture by its config alone: widths that divide, and no key of ours."""
    model = shrunk("portable")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert "efficient" not in config and "auto_map" not in config
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["head_dim"] == 16 and config["intermediate_size"] % 32 == 0
    assert isinstance(config["intermediate_size"], int) and hf_efficient.__version__
