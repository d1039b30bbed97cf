"""Merged key/value heads: exact where they are alike, portable, and better than the mean where they are not."""

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hf_efficient import (
    AttentionConfig,
    ConfigError,
    PruningConfig,
    UnsupportedModelError,
    convert_attention,
    measure,
    merge_kv_heads,
    prune,
)
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.pruning.fit.kv_heads import _factors_commute, _places, merged_config
from hf_efficient.pruning.plan import PruningPlan
from hf_efficient.pruning.price.forecast import forecast

from ...families import make_inputs, make_model
from ...helpers import assert_close

FAMILIES = ["llama", "mistral", "qwen3", "gemma3_text"]
GQA = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
BIAS = {"llama": {"attention_bias": True}, "qwen3": {"attention_bias": True}}


def make(family="llama", **fields):
    return make_model(family, **{**GQA, **BIAS.get(family, {}), **fields})


def batches(padding=None, count=3):
    return [
        {key: value for key, value in make_inputs("llama", padding).items() if key != "labels"} for _ in range(count)
    ]


def parts(model):
    for layer in model.model.layers:
        yield layer.self_attn


@torch.no_grad()
def make_twins(model, turn=0.0):
    """Key/value heads 1 and 3 become what 0 and 2 are, their pairs of numbers turned; queries see nothing of it."""
    for part in parts(model):
        dim = part.head_dim
        for linear in (part.k_proj, part.v_proj):
            for one in filter(lambda x: x is not None, (linear.weight, linear.bias)):
                heads = one.data.unflatten(0, (4, dim))
                heads[1::2] = heads[::2]
        if turn:
            for one in filter(lambda x: x is not None, (part.k_proj.weight, part.k_proj.bias)):
                turn_pairs(one.data.unflatten(0, (4, dim))[1::2], turn)
            for one in filter(lambda x: x is not None, (part.q_proj.weight, part.q_proj.bias)):
                turn_pairs(one.data.unflatten(0, (4, 2, dim))[1::2], turn)
            q, _ = torch.linalg.qr(torch.randn(dim, dim))
            for one in filter(lambda x: x is not None, (part.v_proj.weight, part.v_proj.bias)):
                heads = one.data.unflatten(0, (4, dim))
                heads[1::2] = torch.einsum("de,he...->hd...", q, heads[1::2])
            reads = part.o_proj.weight.data.unflatten(1, (4, 2, dim))
            reads[:, 1::2] = torch.einsum("de,ohre->ohrd", q, reads[:, 1::2])
    return model


def turn_pairs(heads, angle):
    """[..., D, in] or [..., D] in place: number i with number i + D / 2."""
    axis = 1 if heads.dim() <= 3 and heads.shape[1] == 4 else 2
    first, second = (x.clone() for x in heads.chunk(2, axis))
    cos, sin = torch.tensor(angle).cos(), torch.tensor(angle).sin()
    heads.copy_(torch.cat([first * cos - second * sin, first * sin + second * cos], axis))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_data", [False, True])
def test_heads_that_are_alike_are_merged_without_loss(family, with_data):
    model = make_twins(make(family))
    small = merge_kv_heads(model, 2, batches("left") if with_data else None)
    assert type(small) is type(model) and small.config.num_key_value_heads == 2
    assert small.config.num_attention_heads == 8 and model.config.num_key_value_heads == 4
    for padding in ("left", "right"):
        inputs = make_inputs(family, padding)
        real = inputs["attention_mask"].bool()
        assert_close(small(**inputs).logits[real], model(**inputs).logits[real], 1e-3)
    other = make(family)
    lost = merge_kv_heads(other, 2)(**inputs).logits - other(**inputs).logits
    assert lost.abs().max() > 1e-2, "others do lose"


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_heads_that_differ_by_a_turn_are_merged_without_loss_and_not_by_their_mean(family):
    plain = make_twins(make(family))
    turned = make_twins(copy.deepcopy(plain), turn=1.1)
    inputs = make_inputs(family)
    assert_close(turned(**inputs).logits, plain(**inputs).logits, 1e-3)  # the same function
    assert_close(merge_kv_heads(turned, 2, batches())(**inputs).logits, plain(**inputs).logits, 1e-3)
    assert (merge_kv_heads(turned, 2)(**inputs).logits - plain(**inputs).logits).abs().max() > 1e-2


def test_fitted_to_data_more_is_kept():
    model, data = make(), batches("right", 8)
    inputs = make_inputs("llama")
    expected = model(**inputs).logits
    fitted, mean = (merge_kv_heads(model, 2, rows)(**inputs).logits for rows in (data, None))
    assert (fitted - expected).square().mean() < 0.7 * (mean - expected).square().mean()


@pytest.mark.parametrize(("family", "expected"), [("llama", True), ("mistral", True), ("qwen3", False)])
def test_where_pairs_may_be_turned_is_found_by_trying(family, expected):
    model = make(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    places = [place for stack in Anatomy.of(model).stacks for place in _places(stack)]
    assert _factors_commute(model, places) == expected
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_pairs_that_lie_otherwise_are_left_alone():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 50, **GQA}
    model = transformers.CohereForCausalLM(transformers.CohereConfig(**sizes, pad_token_id=0)).eval()
    places = [place for stack in Anatomy.of(model).stacks for place in _places(stack)]
    assert not _factors_commute(model, places)
    assert merge_kv_heads(model, 2, batches()).config.num_key_value_heads == 2


def test_padding_has_no_part_in_it():
    model, rows = make(), batches("left", 1)[0]
    poisoned = {**rows, "input_ids": rows["input_ids"].masked_fill(rows["attention_mask"] == 0, 7)}
    inputs = make_inputs("llama")
    small = merge_kv_heads(model, 2, [rows])(**inputs).logits
    assert torch.equal(small, merge_kv_heads(model, 2, [poisoned])(**inputs).logits)
    assert not torch.equal(small, merge_kv_heads(model, 2, batches("left", 1))(**inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_is_stock_and_generates(family, tmp_path):
    small = merge_kv_heads(make(family), 1, batches())
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__module__.startswith("transformers.") and "efficient" not in loaded.config.to_dict()
    ids = torch.randint(3, 50, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    text = loaded.generate(ids, **options)
    assert torch.equal(text, small.generate(ids, **options))
    assert torch.equal(loaded(text[:, :-1], use_cache=False).logits.argmax(-1)[:, 4:], text[:, 5:])


def test_then_it_is_pruned_and_converted():
    small = merge_kv_heads(make(), 2, batches())
    pruned = prune(small, PruningConfig(ratio=0.3, importance="magnitude"))
    assert pruned.num_parameters() < small.num_parameters()
    local = convert_attention(small, AttentionConfig("local", window=64))
    inputs = make_inputs("llama", "left")
    real = inputs["attention_mask"].bool()
    assert_close(local(**inputs).logits[real], small(**inputs).logits[real], 1e-4)
    again = merge_kv_heads(local, 1)  # local attention knows no heads
    assert again.config.num_key_value_heads == 1 and type(again) is type(local)


def test_the_forecast_says_how_small_the_cache_becomes():
    model = make()
    anatomy = Anatomy.of(model)
    plan = PruningPlan(chosen=False)
    expected = forecast(anatomy, plan, 16, config=merged_config(anatomy, 1))
    assert expected.cache_bytes * 4 == expected.cache_bytes_before == 2 * 3 * 4 * 4 * 16 * 4
    small = merge_kv_heads(model, 1)
    assert expected.parameters == small.num_parameters() and expected.loads_with == "portable"
    assert expected.macs == measure(small, sequence_length=16, batch_size=1, repeats=2).size.macs


@pytest.mark.parametrize(
    ("family", "fields", "kv_heads", "error", "words"),
    [
        ("llama", {}, 3, ConfigError, r"has 4 key/value heads.*Give one of \[1, 2\]"),
        ("llama", {}, 4, ConfigError, r"Give one of \[1, 2\]"),
        ("llama", {}, 0, ConfigError, "integer of 1 or more, got 0"),
        ("llama", {}, "2", ConfigError, "integer of 1 or more, got '2'"),
        ("llama", {"num_key_value_heads": 1}, 1, ConfigError, "has 1 key/value heads.*Fewer than one there cannot be"),
        ("gpt2", {}, 2, UnsupportedModelError, "no field for a number of key/value heads"),
        ("bert", {}, 2, UnsupportedModelError, "no field for a number of key/value heads"),
    ],
)
def test_what_cannot_be_is_refused(family, fields, kv_heads, error, words):
    model = make(family, **fields) if family == "llama" else make_model(family)
    with pytest.raises(error, match=words):
        merge_kv_heads(model, kv_heads)


def test_layers_that_know_their_heads_are_refused():
    model = make()
    with pytest.raises(UnsupportedModelError, match=r"'linear' attention of layer 0 has learned parts for each head"):
        merge_kv_heads(convert_attention(model, AttentionConfig("linear", feature_map="hedgehog")), 2)
    plan = PruningPlan(units={"decoder.0.heads": (0, 1)})
    with pytest.raises(UnsupportedModelError, match="merge first, then prune"):
        merge_kv_heads(prune(model, plan=plan), 2)
