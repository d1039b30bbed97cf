"""What transformers' common model tests ask of a model, for six families with every attention kind."""

import copy
from collections import Counter

import pytest
import torch
from transformers import AutoConfig, BertForMaskedLM, PreTrainedModel
from transformers.utils.output_capturing import CompileableContextVar

from hf_efficient import convert_attention
from hf_efficient.attention.registry import ATTENTIONS
from hf_efficient.attention.variant import AttentionVariant
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.families import FAMILIES

from ..attention.tiny import TINY, TINY_JOBS
from ..families import CASES, LENGTH, PADDED, VOCABULARY, make_inputs, make_model, one_layer
from ..helpers import assert_close, selected

# Every kind in an encoder and a decoder, every family with three kinds.
JOBS = selected(
    TINY_JOBS,
    lambda family, name: family in ("bert", "llama") or name in ("local-global", "local_linear", "linear-elu"),
)
pytestmark = [pytest.mark.parametrize(("family", "name"), JOBS), pytest.mark.cover]

SEQUENCES_OUT = ("t5", "bart")  # the output is that of the decoder


def make(family, name, head=None, **fields):
    """A converted model whose learned parts have left their starting values."""
    model = convert_attention(make_model(family, head, **fields), TINY[name])
    with torch.no_grad():
        for variant in variants(model):
            for parameter in variant.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def variants(model):
    return [module for module in model.modules() if isinstance(module, AttentionVariant)]


def padded_inputs(family):
    return make_inputs(family, CASES[family].paddings[0])


def no_cache(family):
    return {"use_cache": False} if family in ("llama", "gpt2", *SEQUENCES_OUT) else {}


def with_labels(family, inputs):
    shape = {"vit": (2,), "t5": (2, 7), "bart": (2, 7)}.get(family, (2, LENGTH))
    return inputs | {"labels": torch.randint(0, 2, shape)}


def test_saved_and_loaded_it_is_the_same(family, name, tmp_path):
    model, inputs = make(family, name), padded_inputs(family)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])


def test_the_config_goes_there_and_back(family, name, tmp_path):
    config = make(family, name).config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert loaded.efficient == config.efficient and loaded.block() == config.block()
    assert type(config).from_dict(config.to_dict()).block() == config.block()
    assert copy.deepcopy(config).block() == config.block()


def test_it_is_deterministic(family, name):
    model, inputs = make(family, name), padded_inputs(family)
    assert torch.equal(model(**inputs)[0], model(**inputs)[0])
    torch.manual_seed(5)
    first = type(model)(copy.deepcopy(model.config)).state_dict()
    torch.manual_seed(5)
    second = type(model)(copy.deepcopy(model.config)).state_dict()
    assert first.keys() == second.keys() == model.state_dict().keys()
    assert all(torch.isfinite(value).all() and torch.equal(value, second[key]) for key, value in first.items())


def test_a_row_alone_is_the_row_in_a_batch(family, name):
    model, inputs = make(family, name).double(), make_inputs(family)
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    together = model(**inputs)[0]
    for row in range(2):
        alone = model(**{key: value[row : row + 1] for key, value in inputs.items()})[0]
        assert_close(together[row : row + 1], alone, 1e-9)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_padding_changes_nothing(family, name):
    for side in CASES[family].paddings:
        if side is None:
            return
        model, inputs = make(family, name).double(), make_inputs(family, side)
        mask = inputs["attention_mask"]
        real = mask[0].bool()
        assert real.sum() == LENGTH - PADDED
        if family not in SEQUENCES_OUT:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        batched = model(**inputs)[0][0]
        alone = {key: value[:1] for key, value in inputs.items() if key not in ("attention_mask", "position_ids")}
        alone["input_ids"] = alone["input_ids"][:, real]
        expected = model(**alone)[0][0]
        if family == "bart" and side == "left":
            continue  # BART counts its positions from the left edge, padded or not
        assert_close(batched if family in SEQUENCES_OUT else batched[real], expected, 1e-9, f"{side} padding")


def test_every_weight_learns(family, name):
    model, inputs = make(family, name).train(), with_labels(family, padded_inputs(family))
    model(**inputs).loss.backward()
    unread = ["pooler", "mask_token"]
    if name == "kernel-positions":  # weights by distance alone
        unread += [path for stack in FAMILIES[family].stacks for path in (stack.attention.query, stack.attention.key)]
    for key, parameter in model.named_parameters():
        if parameter.grad is None:
            assert any(part in key for part in unread), key
            continue
        assert torch.isfinite(parameter.grad).all(), key
    learned = [parameter for variant in variants(model) for parameter in variant.parameters()]
    assert all(parameter.grad.abs().max() > 0 for parameter in learned)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_gradient_checkpointing_gives_the_same_gradients(family, name):
    model, inputs = make(family, name).train(), with_labels(family, padded_inputs(family))
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**inputs, **no_cache(family)).loss.backward()
        grads.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for key, expected in grads[0].items():
        assert_close(grads[1][key], expected, 1e-5, key)


def test_hidden_states_and_attentions_are_given(family, name):
    model, inputs = make(family, name), padded_inputs(family) | no_cache(family)
    expected = model(**inputs)[0]
    out = model(**inputs, output_hidden_states=True)
    states = out.encoder_hidden_states if family in SEQUENCES_OUT else out.hidden_states
    assert len(states) == 4 and all(torch.isfinite(state).all() for state in states)
    out = model(**inputs, output_attentions=True)
    assert_close(out[1] if "loss" in out else out[0], expected, 1e-6)
    groups = {"t5": ("encoder_attentions", "decoder_attentions"), "bart": ("encoder_attentions", "decoder_attentions")}
    for group in groups.get(family, ("attentions",)):
        for weights in out[group]:
            length = weights.shape[-2]
            if not ATTENTIONS[TINY[name].kind].has_weights:
                assert weights.shape == (2, 4, length, 0) and length
                continue
            assert weights.shape == (2, 4, length, length)
            check_weights(weights, causal=family in ("llama", "gpt2") or group == "decoder_attentions")
            if length == LENGTH and "attention_mask" in inputs:
                padded = inputs["attention_mask"] == 0
                assert weights.movedim(3, 1)[padded].eq(0).all(), "a padded key has weight"


def test_everything_that_is_recorded_is_recorded_once(family, name, monkeypatch):
    """As transformers' `test_capture_outputs_decorator`: a collector inside another would take its outputs."""
    model, inputs = make(family, name), padded_inputs(family) | no_cache(family)
    recorded = set().union(*(part._can_record_outputs or {} for part in model.modules() if is_model(part)))
    is_open, opened = Counter(), []
    enter, leave = CompileableContextVar.set, CompileableContextVar.reset

    def new_set(self, value):
        is_open.update(value.keys())
        opened.extend(value)
        assert max(is_open.values()) == 1, is_open
        return enter(self, value)

    def new_reset(self, token):
        is_open.subtract(self.context_var.get().keys())
        leave(self, token)

    monkeypatch.setattr(CompileableContextVar, "set", new_set)
    monkeypatch.setattr(CompileableContextVar, "reset", new_reset)
    out = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert {"attentions", "hidden_states"} <= recorded and {"attentions", "hidden_states"} <= set(opened)
    attentions = [out[key] for key in out if key.endswith("attentions") and "cross" not in key]
    assert attentions and all(len(group) == 3 and all(w.shape[0] == 2 for w in group) for group in attentions)


def is_model(module):
    return isinstance(module, PreTrainedModel)


def check_weights(weights, causal):
    assert weights.min() > -1e-6
    total = weights.sum(-1)
    assert_close(total, torch.where(total < 0.5, 0.0, 1.0), 1e-4, "sum of the weights")
    assert total.max() > 0.5
    if causal:
        assert weights.triu(1).abs().max() < 1e-6
    assert (weights - torch.eye(weights.shape[-1])).abs().max() > 1e-3


def test_dtypes_and_devices(family, name, tmp_path):
    model, inputs = make(family, name, **one_layer(family)), padded_inputs(family)
    expected = model(**inputs)[0]
    double = copy.deepcopy(model).double()
    cast = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    out = double(**cast)[0]
    assert out.dtype == torch.float64
    assert_close(out, expected, 1e-4)
    low = copy.deepcopy(model).to(torch.bfloat16)
    cast = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    out = low(**cast)[0]
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(**inputs)[0]).all()
    meta = copy.deepcopy(model).to("meta")
    assert {tensor.device.type for tensor in (*meta.parameters(), *meta.buffers())} == {"meta"}
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_embeddings_can_be_given_and_grow(family, name):
    if family == "vit":
        pytest.skip("images have no vocabulary")
    model, inputs = make(family, name, BertForMaskedLM if family == "bert" else None), padded_inputs(family)
    expected = model(**inputs)[0]
    embedded = {key: value for key, value in inputs.items() if key != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
    if family == "bart":
        embedded["inputs_embeds"] = model.model.encoder.embed_tokens(inputs["input_ids"])
    assert_close(model(**embedded)[0], expected, 1e-5)
    model.resize_token_embeddings(VOCABULARY + 9)
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY + 9
    assert torch.equal(model(**inputs)[0][..., :VOCABULARY], expected[..., :VOCABULARY])


def test_it_really_is_converted(family, name):
    """The twin of all the above: the attention is there, and it makes a difference."""
    model, inputs = make(family, name), padded_inputs(family)
    causal = [stack.is_causal for stack in Anatomy.of(model).stacks for _ in stack.layers]
    assert [variant.config for variant in variants(model)] == [TINY[name].resolve(one) for one in causal]
    assert (model(**inputs)[0] - make_model_like(model, family)(**inputs)[0]).abs().max() > 1e-4


def make_model_like(model, family):
    stock = make_model(family)
    state = {key: value for key, value in model.state_dict().items() if ".efficient_attention." not in key}
    stock.load_state_dict(state)
    return stock
