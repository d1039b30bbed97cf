"""A mask of all pairs of the caller's own: full and local attention obey it, in blocks, the other kinds refuse it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_efficient import AttentionConfig, UnsupportedModelError, convert_attention
from hf_efficient.attention import naive
from hf_efficient.attention.dispatch import efficient_attention_forward
from hf_efficient.attention.engines.parts import full_attention
from hf_efficient.attention.kinds.local import local_attention, local_decode
from hf_efficient.attention.masks import key_mask
from hf_efficient.attention.registry import ATTENTIONS
from hf_efficient.attention.variant import Logits
from hf_efficient.models.derive import family_for
from hf_efficient.models.derive.compare import distance, outputs_of
from hf_efficient.models.derive.inputs import tiny_inputs
from hf_efficient.models.derive.tiny import tiny_config, tiny_model

from ..helpers import assert_close, padding_mask
from .cases import HEADS, assert_equals_naive, make_bias, make_inputs

OF_TEXT = [kind for kind in ATTENTIONS if kind != "merging"]  # a decoder cannot merge tokens

FUNCTIONS = {
    "full": (full_attention, naive.naive_full_attention, {}),
    "local": (local_attention, naive.naive_local_attention, {"window": 5}),
    "global": (local_attention, naive.naive_local_attention, {"window": 5, "global_tokens": 3}),
}


def make_pairs(name, seen, length=None):
    """A mask of each sort: for all heads or each, of whole rows, bool or added scores."""
    generator = torch.Generator().manual_seed(seen)
    rows = 1 if name == "padding" else length or seen
    heads = HEADS if name == "heads" else 1
    pairs = torch.rand(2, heads, rows, seen, generator=generator, dtype=torch.float64)
    if name in ("bool", "heads", "padding"):
        return pairs > 0.3
    return (pairs * 3).masked_fill(pairs < 0.3, float("-inf"))


@pytest.mark.parametrize("pairs", ["bool", "heads", "padding", "scores"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_equals_naive(name, pairs, causal):
    fast, slow, options = FUNCTIONS[name]
    for seen in (7, 150):
        given = make_pairs(pairs, seen)
        inputs, mask = make_inputs(seen), padding_mask("left", 2, seen)
        assert_equals_naive(fast, slow, inputs, mask, pairs=given, causal=causal, **options)
        bias = make_bias(seen)
        assert_equals_naive(fast, slow, inputs, None, bias, pairs=given, causal=causal, **options)
        logits = Logits(1.5, torch.zeros(HEADS, dtype=torch.float64))
        assert_equals_naive(fast, slow, inputs, mask, pairs=given, causal=causal, logits=logits, **options)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("seen", "length"), [(9, 1), (150, 1), (150, 5), (200, 140)])
def test_queries_at_the_end_equal_naive(name, seen, length):
    fast, slow, options = FUNCTIONS[name]
    given = make_pairs("bool", seen, length)
    assert_equals_naive(fast, slow, make_inputs(seen, length), pairs=given, causal=True, **options)


@pytest.mark.parametrize("name", ["local", "global"])
@pytest.mark.parametrize("pairs", ["heads", "scores"])
def test_decoding_equals_the_whole(name, pairs):
    options = FUNCTIONS[name][2]
    inputs, mask, given = make_inputs(40), padding_mask("left", 2, 40), make_pairs(pairs, 40)
    expected = local_attention(*inputs, mask, causal=True, pairs=given, **options)
    parts, state = [], None
    for begin, end in ((0, 15), (15, 16), (16, 17), (17, 24), (24, 40)):
        new, seen = [x[:, :, begin:end] for x in inputs], given[:, :, begin:end, :end]
        out, state = local_decode(*new, mask[:, begin:end], state, pairs=seen, scaling=None, bias=None, **options)
        parts.append(out)
    real = mask[:, None, :, None]
    assert_close(torch.cat(parts, 2) * real, expected * real, 1e-10)


def make_llama(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=100, initializer_range=0.3, **changes)
    return LlamaForCausalLM(config).eval()


def test_packed_sequences_give_what_each_gives_alone():
    model, ids = make_llama(), torch.randint(3, 100, (2, 12))
    positions = torch.tensor([[*range(7), *range(5)]]).expand(2, -1)
    for converted in (
        convert_attention(model, AttentionConfig("local", window=3, global_tokens=0)),
        convert_attention(model, {0: AttentionConfig("local", window=3, global_tokens=0)}),
    ):
        packed = converted(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = [converted(input_ids=part, use_cache=False).logits for part in (ids[:, :7], ids[:, 7:])]
        assert_close(packed, torch.cat(alone, 1), 1e-4)
        assert (packed - converted(input_ids=ids, use_cache=False).logits).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [kind for kind in OF_TEXT if not ATTENTIONS[kind].takes_pairs])
def test_kinds_that_cannot_obey_refuse(kind):
    converted = convert_attention(make_llama(), AttentionConfig(kind))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(UnsupportedModelError, match=rf"'{kind}' .* a 4D mask was given.*Kinds that obey one: local"):
        converted(input_ids=torch.ones(1, 6, dtype=torch.long), position_ids=positions, use_cache=False)


def test_a_mask_that_is_the_same_for_all_queries_is_padding_for_every_kind():
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, 6:] = False
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    for kind in OF_TEXT:
        module = convert_attention(make_llama(), AttentionConfig(kind)).model.layers[0].self_attn
        module.efficient_is_causal = False
        expected = efficient_attention_forward(module, query, key, key, real)[0]
        for mask in (real[:, None, None], torch.zeros(2, 1, 1, 9).masked_fill(~real[:, None, None], -10000.0)):
            assert_close(efficient_attention_forward(module, query, key, key, mask)[0], expected, 1e-6)
    with pytest.raises(UnsupportedModelError, match="a 4D mask was given"):
        efficient_attention_forward(module, query, key, key, torch.randn(2, 1, 1, 9))


@pytest.mark.parametrize("causal", [False, True])
def test_a_module_of_which_nothing_is_known_hides_what_its_mask_hides(causal):
    module = convert_attention(make_llama(), AttentionConfig("local", window=3)).model.layers[0].self_attn
    module.is_causal = not causal
    inputs = torch.randn(1, 4, 9, 8), *torch.randn(2, 1, 2, 9, 8)
    pairs = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    out = efficient_attention_forward(module, *inputs, pairs.tril() if causal else pairs)[0]
    options = {"window": 3, "global_tokens": 4, "causal": causal}
    assert_close(out.transpose(1, 2), local_attention(*inputs, **options), 1e-6)


def test_keys_behind_the_last_query_are_refused():
    module = convert_attention(make_llama(), AttentionConfig("local", window=3)).model.layers[0].self_attn
    query, key = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 9, 8)
    pairs = (torch.arange(9) < 6).expand(1, 1, 2, 9)
    with pytest.raises(UnsupportedModelError, match="static cache"):
        efficient_attention_forward(module, query, key, key, pairs)
    out, _ = efficient_attention_forward(module, query, key[:, :, :6], key[:, :, :6], pairs[..., :6])
    assert out.shape == (1, 2, 4, 8)


def test_what_a_carrier_cannot_say_is_a_mask_of_pairs():
    sizes = {"batch_size": 2, "q_length": 5, "kv_length": 5}
    plain = (causal_mask_function, sliding_window_causal_mask_function(3))
    assert all(key_mask(**sizes, mask_function=one) is None for one in plain)

    def odd(batch, head, query, key):
        return (query + key) % 2 == 0

    pairs = key_mask(**sizes, mask_function=odd)
    assert pairs.shape == (2, 1, 5, 5) and pairs[0, 0, 0].tolist() == [True, False, True, False, True]
    wanted = key_mask(**sizes, mask_function=causal_mask_function, allow_is_causal_skip=False)
    assert torch.equal(wanted[0, 0], torch.ones(5, 5, dtype=torch.bool).tril())


def test_a_bias_of_all_pairs_is_refused_by_others():
    model = tiny_model(tiny_config(CONFIG_MAPPING["umt5"]()))
    with pytest.raises(UnsupportedModelError, match=r"'strided' .* bias that umt5 models have .*: local"):
        convert_attention(model, AttentionConfig("strided"))
    module = convert_attention(model, AttentionConfig("local")).encoder.block[0].layer[0].SelfAttention
    query, bias = torch.randn(2, 1, 4, 7, 8), torch.randn(1, 4, 7, 7)
    outs = [efficient_attention_forward(module, *query, query[0], None, position_bias=b)[0] for b in (bias, bias * 0)]
    assert (outs[0] - outs[1]).abs().max() > 1e-3


# Models that make their masks themselves: padding alone, blocks of images, a relative bias beside it, chunks.
@pytest.mark.parametrize(
    "model_type",
    ["layoutlm", "pixtral", pytest.param("switch_transformers", marks=pytest.mark.thorough), "llama4_text", "umt5"],
)
def test_models_with_masks_of_their_own(model_type):
    model = tiny_model(tiny_config(CONFIG_MAPPING[model_type]()))
    inputs, family = tiny_inputs(model), family_for(model.config, model)
    assert family.why_not("convert") is None
    wide, narrow = (
        convert_attention(
            model, {stack.name: AttentionConfig("local", window=w, global_tokens=0) for stack in family.stacks}
        )
        for w in (64, 2)
    )
    expected = outputs_of(model, inputs)
    assert distance(outputs_of(wide, inputs), expected, inputs) < 1e-4
    assert distance(outputs_of(narrow, inputs), expected, inputs) > 1e-3
