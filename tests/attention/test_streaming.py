"""Global tokens that stay near: equal to the twin however the text is cut, and never farther than the window's end."""

import pytest
import torch
import transformers

from hf_efficient import AttentionConfig, ConfigError, UnsupportedModelError, convert_attention, extend_positions
from hf_efficient.attention.engines.streaming import Rotary
from hf_efficient.attention.kinds.local import local_attention, local_decode
from hf_efficient.attention.naive import naive_local_attention

from ..families import make_inputs, make_model
from ..helpers import assert_close, leaves, padding_mask

WINDOW, GLOBAL = 5, 2
STREAMING = AttentionConfig("local", window=WINDOW, global_tokens=GLOBAL, streaming=True)
FAR = AttentionConfig("local", window=WINDOW, global_tokens=GLOBAL)


def rotary(length, dim=8, first=0, stretch=1.0):
    """Cosines and sines in float64 as a Llama makes them; YaRN multiplies them by `stretch`."""
    rates = 100.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(first, first + length, dtype=torch.float64)[:, None] * rates
    angles = torch.cat([angles, angles], -1)[None]
    return angles.cos() * stretch, angles.sin() * stretch


def turned(length, stretch=1.0, heads=4, kv_heads=2, batch=2):
    """Queries, keys and values of which the former two are turned to their places, and the places."""
    places = rotary(length, stretch=stretch)
    query = torch.randn(batch, heads, length, 8, dtype=torch.float64)
    key, value = torch.randn(2, batch, kv_heads, length, 8, dtype=torch.float64)
    return Rotary(*places).turn(query), Rotary(*places).turn(key), value, places


@pytest.mark.parametrize("length", [4, 7, 8, 33, 150])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("stretch", [1.0, 1.3])
def test_outputs_and_gradients_are_those_of_the_twin(length, side, stretch):
    *inputs, places = turned(length, stretch)
    mask, options = padding_mask(side, 2, length), {"window": WINDOW, "global_tokens": GLOBAL, "causal": True}
    real = torch.ones(2, length, dtype=torch.bool) if mask is None else mask
    results = []
    for attention in (local_attention, naive_local_attention):
        tensors = leaves(*inputs)
        out = attention(*tensors, mask, **options, rotary=places)
        out = out.masked_fill(~real[:, None, :, None], 0)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 1e-9 * max(1, expected.abs().max().item()))
    plain = local_attention(*inputs, mask, **options).masked_fill(~real[:, None, :, None], 0)
    reach = WINDOW + GLOBAL - 1  # up to there nothing changes
    assert_close(plain[1, :, : reach + 1], results[0][0][1, :, : reach + 1], 1e-9)
    assert ((plain - results[0][0]).abs().max() > 1e-3) == (length > reach + 1)


@pytest.mark.parametrize("cuts", [[1] * 40, [3, 1, 1, 20, 1, 14], [12, 28], [40]], ids=str)
@pytest.mark.parametrize("side", [None, "left"])
def test_decoding_in_any_pieces_gives_the_same(cuts, side):
    query, key, value, places = turned(40)
    mask = padding_mask(side, 2, 40)
    real = torch.ones(2, 40, dtype=torch.bool) if mask is None else mask
    options = {"window": WINDOW, "global_tokens": GLOBAL}
    state, outs, start = None, [], 0
    for count in cuts:
        piece = slice(start, start + count)
        parts = (x[:, :, piece] for x in (query, key, value))
        own = tuple(x[:, piece] for x in places)
        out, state = local_decode(*parts, real[:, piece], state, **options, rotary=own)
        outs.append(out)
        start += count
    whole = naive_local_attention(query, key, value, mask, **options, causal=True, rotary=places)
    assert_close(torch.cat(outs, 2)[:, :, -20:], whole[:, :, -20:], 1e-9)
    assert sum(x.nbytes for x in state) < 2 * (WINDOW + GLOBAL + 2) * 2 * 2 * 8 * 8, "it does not grow"


def test_a_text_may_begin_anywhere_and_go_on_for_ever():
    """What the last query sees does not change with how far the global tokens are behind."""
    lasts = []
    for gap in (0, 1000):
        torch.manual_seed(0)
        query, key, value = torch.randn(3, 1, 1, 20, 8, dtype=torch.float64)
        cos, sin = rotary(1020)
        index = torch.cat([torch.arange(GLOBAL), torch.arange(GLOBAL, 20) + gap])
        places = cos[:, index], sin[:, index]
        query, key = Rotary(*places).turn(query), Rotary(*places).turn(key)
        reach = (cos[:, index], sin[:, index])
        edge = WINDOW + GLOBAL - 1
        reach[0][:, edge], reach[1][:, edge] = cos[:, edge], sin[:, edge]  # the place that was passed on the way
        options = {"window": WINDOW, "global_tokens": GLOBAL, "causal": True}
        lasts.append(local_attention(query, key, value, **options, rotary=reach)[:, :, -1])
    assert_close(*lasts, 1e-9)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("padding", [None, "left"])
def test_models_decode_as_they_read(family, padding):
    own = {"mistral": {"sliding_window": None}, "gemma3_text": {"layer_types": ["full_attention"] * 3}}
    model = make_model(family, max_position_embeddings=16, **own.get(family, {}))
    near, far = convert_attention(model, STREAMING), convert_attention(model, FAR)
    ids = torch.randint(3, 50, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, : 6 if padding else 0] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = near(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert (whole - far(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits).abs().max() > 1e-4
    cache, steps = None, []
    for start, end in [(0, 9), *((i, i + 1) for i in range(9, 40))]:
        piece = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        out = near(ids[:, start:end], **piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert_close(torch.cat(steps, 1)[mask.bool()], whole[mask.bool()], 1e-4)


def test_generating_many_windows_is_reading_them(tmp_path):
    """40 tokens, 8 windows and more than twice what the model takes; the same after saving and loading."""
    model = make_model("llama", transformers.LlamaForCausalLM, max_position_embeddings=16)
    near = convert_attention(model, STREAMING)
    prompt = torch.randint(3, 50, (2, 4))
    options = {"max_new_tokens": 36, "do_sample": False, "eos_token_id": None}
    text = near.generate(prompt, **options)
    greedy = near(text[:, :-1], use_cache=False).logits.argmax(-1)
    assert torch.equal(greedy[:, 3:], text[:, 4:])
    near.save_pretrained(tmp_path)
    assert torch.equal(type(near).from_pretrained(tmp_path).generate(prompt, **options), text)
    yarn = extend_positions(near, 64, rope="yarn")
    text = yarn.generate(prompt, **options)
    assert torch.equal(yarn(text[:, :-1], use_cache=False).logits.argmax(-1)[:, 3:], text[:, 4:])


def test_what_it_is_not_for_is_refused():
    with pytest.raises(ConfigError, match=r"streaming=True has no meaning for kind='linear'"):
        AttentionConfig("linear", streaming=True)
    with pytest.raises(ConfigError, match="needs global tokens to keep near; got True with global_tokens=0"):
        AttentionConfig("local", global_tokens=0, streaming=True)
    with pytest.raises(ConfigError, match="streaming must be true or false"):
        AttentionConfig("local", streaming="yes")
    with pytest.raises(UnsupportedModelError, match=r"of decoders with rotary positions, not for the encoder"):
        convert_attention(make_model("bert"), AttentionConfig("local", global_tokens=1, streaming=True))
    with pytest.raises(UnsupportedModelError, match="rotary positions"):
        convert_attention(make_model("gpt2"), STREAMING)
    with pytest.raises(UnsupportedModelError, match="rotary positions"):
        convert_attention(make_model("t5"), {"decoder": STREAMING})
    cohere = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    cohere = transformers.CohereForCausalLM(transformers.CohereConfig(**cohere, vocab_size=50)).eval()
    with pytest.raises(UnsupportedModelError, match="do not turn with their places"):
        convert_attention(cohere, STREAMING)


def test_layers_with_a_window_of_the_model_stay_as_they_were_trained():
    model = make_model("mistral", sliding_window=4)
    converted = convert_attention(model, AttentionConfig("local", window=4, streaming=True))
    inputs = make_inputs("mistral")
    assert_close(converted(**inputs)[0], model(**inputs)[0], 1e-5)
    assert not any("streaming" in one for one in converted.config.efficient["stacks"]["decoder"]["attention"])


def test_a_cache_of_all_keys_has_no_places():
    near = convert_attention(make_model("llama"), STREAMING)
    cache = near.train()(torch.randint(3, 50, (1, 9)), use_cache=True).past_key_values
    with pytest.raises(UnsupportedModelError, match="that the model itself has filled, in eval mode"):
        near.eval()(torch.randint(3, 50, (1, 1)), past_key_values=cache)
