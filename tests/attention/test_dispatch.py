"""The one attention function inside real models: padding, dropout, gradients, and what it refuses."""

import copy
import inspect

import pytest
import torch

from hf_efficient import AttentionConfig, UnsupportedModelError, convert_attention
from hf_efficient.models.families import FAMILIES

from ..families import (
    CASES,
    CAUSAL,
    LENGTH,
    PADDED,
    PADDED_CASES,
    TWO_STACKS,
    VOCABULARY,
    make_inputs,
    make_model,
    one_layer,
    position_ids,
)
from ..helpers import assert_close

NARROW = AttentionConfig(kind="local", window=2)
GLOBAL = AttentionConfig(kind="local", window=2, global_tokens=2)
WIDE = AttentionConfig(kind="local", window=64)
LINEAR = AttentionConfig(kind="linear")
MIXED = {0: GLOBAL, 1: AttentionConfig(), 2: LINEAR}
# CLIP answers with one number for an image and a text; its text tower alone shows every token.
TEXT_CASES = [(name, side) for name, side in PADDED_CASES if side is not None and CASES[name].hidden]
EMBEDDED = [
    (name, side)
    for name, side in TEXT_CASES
    if "inputs_embeds" in inspect.signature(CASES[name].head.forward).parameters
]
# These count their positions from the left edge, padded or not.
FROM_THE_EDGE = ("bart", "marian")


def convert(name, config, **fields):
    """T5 has no place for linear attention, so it gets local attention there."""
    if FAMILIES[name].relative_bias and config in (LINEAR, MIXED):
        config = {0: GLOBAL, 1: AttentionConfig(), 2: NARROW}
    return convert_attention(make_model(name, **fields), config)


@pytest.mark.cover
@pytest.mark.parametrize(("name", "side"), TEXT_CASES)
@pytest.mark.parametrize("config", [NARROW, GLOBAL, LINEAR, MIXED], ids=["local", "global", "linear", "mixed"])
def test_a_row_alone_gives_what_it_gives_in_a_padded_batch(name, side, config):
    """In float64: in float32 the rounding of some processors is larger than the tolerance (Gemma 3)."""
    model, inputs = convert(name, config).double(), make_inputs(name, side)
    mask = inputs["attention_mask"]
    real = mask[0].bool()
    assert real.sum() == LENGTH - PADDED
    alone = {key: value[:1] for key, value in inputs.items() if key != "attention_mask"}
    alone["input_ids"] = alone["input_ids"][:, real]
    batched = model(**inputs, **position_ids(model, mask))[0][0]
    expected = model(**alone)[0][0]
    if name not in FROM_THE_EDGE or side == "right":
        assert_close(batched if name in TWO_STACKS else batched[real], expected, 1e-5)
    without_mask = model(**inputs | {"attention_mask": torch.ones_like(mask)}, **position_ids(model, mask))[0][0]
    if name not in (*CAUSAL, "clip_text_model") or side == "left":
        assert (without_mask - batched).abs().max() > 1e-3


@pytest.mark.cover
@pytest.mark.parametrize(("name", "side"), EMBEDDED)
@pytest.mark.parametrize("config", [GLOBAL, LINEAR, MIXED], ids=["global", "linear", "mixed"])
def test_padded_embeddings_get_no_gradient(name, side, config):
    model, inputs = convert(name, config), make_inputs(name, side)
    mask = inputs["attention_mask"].bool()
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    out = model(inputs_embeds=embeddings, **inputs)[0]
    (out if name in TWO_STACKS else out[mask]).square().sum().backward()
    assert embeddings.grad[~mask].eq(0).all()
    assert embeddings.grad[mask].abs().amax(-1).gt(0).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.cover
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("config", [NARROW, LINEAR], ids=["local", "linear"])
def test_dropout_is_active_in_training_only(name, config):
    small = {} if FAMILIES[name].relative_bias else one_layer(name)  # of these one layer is converted and one is not
    model, inputs = convert(name, config, **small, **dict.fromkeys(CASES[name].dropout, 0.5)), make_inputs(name)
    assert torch.equal(model(**inputs)[0], model(**inputs)[0])
    model.train()
    assert not torch.equal(model(**inputs)[0], model(**inputs)[0])
    without = convert(name, config, **small).train()
    assert torch.equal(without(**inputs)[0], without(**inputs)[0])


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].hidden])
def test_attention_weights_are_those_that_are_used(name):
    model, inputs = make_model(name), make_inputs(name)
    stock = copy.deepcopy(model)
    stock.set_attn_implementation("eager")
    outs = [
        one(**inputs, output_attentions=True) for one in (stock, convert_attention(model, WIDE), convert(name, NARROW))
    ]
    fields = [field.replace("hidden_states", "attentions") for field in CASES[name].hidden]
    for field in fields:
        expected, wide, narrow = (out[field] for out in outs)
        assert len(wide) == len(narrow) == 3
        for weights, dense, some in zip(expected or wide, wide, narrow, strict=True):  # stock T5 gives none in 5.17
            assert_close(dense, weights, 1e-5)
            assert some.shape == weights.shape
            assert_close(some.sum(-1), torch.ones_like(some.sum(-1)), 1e-5)
            assert (some.eq(0) & weights.ne(0)).any()
    with pytest.raises(ValueError, match="output_attentions"):
        convert(name, NARROW).config.output_attentions = True


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_4d_mask_is_obeyed_by_local_and_refused_by_others(name):
    inputs = make_inputs(name)
    mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    other = AttentionConfig("strided", block_size=2, num_blocks=1)
    for config in (NARROW, {2: NARROW}):
        converted = convert_attention(make_model(name), config)
        plain = converted(**inputs)[0]
        assert_close(
            converted(**inputs | {"attention_mask": mask.tril() if name == "llama" else mask})[0], plain, 1e-5
        )
        mask[..., 1] = False
        assert (converted(**inputs | {"attention_mask": mask})[0] - plain).abs().max() > 1e-3
        mask[..., 1] = True
    mask[:, :, 5, 1] = False  # of one query alone, which is more than padding and order
    for config in (other, {2: other}):
        with pytest.raises(UnsupportedModelError, match=r"'strided' .* a 4D mask was given"):
            convert_attention(make_model(name), config)(**inputs | {"attention_mask": mask})
    with pytest.raises(UnsupportedModelError, match=r"A 4D mask \[2, 1, 2, \d+\] does not fit \d+ queries"):
        converted(**inputs | {"attention_mask": mask[:, :, :2]})


def test_a_layer_left_dense_still_takes_a_4d_mask():
    model = make_model("llama")
    converted = convert_attention(model, {2: NARROW})
    states = torch.randn(2, LENGTH, 16)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(1)[None, None].expand(2, 1, -1, -1)
    rotary = model.model.rotary_emb(states, torch.arange(LENGTH)[None])
    outs = [
        one.model.layers[0](states, attention_mask=given, position_embeddings=rotary)
        for one, given in ((converted, mask), (model, mask), (model, mask.tril()))
    ]
    assert_close(outs[0], outs[1], 1e-6)
    assert (outs[0] - outs[2]).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "value"), [("softcap", 30.0), ("s_aux", torch.zeros(4))])
def test_arithmetic_that_a_kind_has_no_place_for_is_refused(name, value):
    from hf_efficient.attention.dispatch import efficient_attention_forward

    module = convert_attention(make_model("llama"), LINEAR).model.layers[0].self_attn
    query, key = torch.randn(1, 4, 5, 4), torch.randn(1, 2, 5, 4)
    out, weights = efficient_attention_forward(module, query, key, key, None, **{name: None})
    assert out.shape == (1, 5, 4, 4) and weights is None
    with pytest.raises(UnsupportedModelError, match="'linear' attention cannot express the capped scores or the att"):
        efficient_attention_forward(module, query, key, key, None, **{name: value})


def test_a_bert_decoder_keeps_its_cross_attention_and_its_causality():
    model = make_model("bert", head=None, is_decoder=True, add_cross_attention=True)
    ids, states = torch.randint(3, VOCABULARY, (2, 7)), torch.randn(2, 11, 16)
    encoder_mask = torch.ones(2, 11)
    encoder_mask[0, 6:] = 0
    inputs = {"encoder_hidden_states": states, "encoder_attention_mask": encoder_mask}
    wide = convert_attention(model, AttentionConfig(kind="local", window=32)).bert
    expected = model.bert(input_ids=ids, **inputs)[0]
    out = wide(input_ids=ids, **inputs)[0]
    assert_close(out, expected, 1e-5)
    ids[:, 5:] = 3
    changed = wide(input_ids=ids, **inputs)[0]
    assert_close(changed[:, :5], out[:, :5], 1e-6)
    assert (changed[:, 5:] - out[:, 5:]).abs().max() > 1e-3
    assert (wide(input_ids=ids, encoder_hidden_states=states)[0] - changed).abs().max() > 1e-3
