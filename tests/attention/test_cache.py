"""The cache layer that holds a state, how it gets into the cache, and the window-sized state of local attention."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, EncoderDecoderCache, GPTNeoXConfig, GPTNeoXForCausalLM, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from hf_efficient import AttentionConfig, UnsupportedModelError, convert_attention
from hf_efficient.attention.cache import AllKeysLayer, StateLayer, attach_cache
from hf_efficient.attention.dispatch import decodes_from_state, variant_of
from hf_efficient.attention.kinds.local import local_attention, local_decode
from hf_efficient.attention.registry import ATTENTIONS

from ..families import VOCABULARY, make_model
from ..families import make_inputs as make_model_inputs
from ..helpers import assert_close, leaves, padding_mask, random_examples
from .cases import make_bias, make_inputs

LOCAL = AttentionConfig("local", window=4, global_tokens=1)


def in_steps(inputs, cuts, key_mask=None, bias=None, **options):
    """`local_decode` of the pieces between `cuts`, and the states after each."""
    seen, state, outs, states = inputs[0].shape[2], None, [], []
    for start, end in zip([0, *cuts], [*cuts, seen], strict=True):
        piece = [tensor[:, :, start:end] for tensor in inputs]
        mask = None if key_mask is None else key_mask[:, start:end]
        own = None if bias is None else bias[..., seen - end : seen + end - start - 1]
        out, state = local_decode(*piece, mask, state, bias=own, **options)
        outs.append(out)
        states.append(state)
    return torch.cat(outs, 2), states


CUTS = {"token by token": range(1, 150), "chunks": (1, 3, 40, 41, 140), "prefill and tokens": range(100, 150)}


@pytest.mark.cover(2)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("global_tokens", [0, 3])
@pytest.mark.parametrize("window", [1, 2, 20, 70, 500])
def test_local_decoding_equals_the_whole(cuts, side, global_tokens, window):
    inputs, mask = make_inputs(150), padding_mask(side, 2, 150)
    for bias in (None, make_bias(150)):
        options = {"window": window, "global_tokens": global_tokens, "scaling": 0.7, "bias": bias}
        out, _ = in_steps(inputs, cuts, mask, **options)
        assert_close(out, local_attention(*inputs, mask, causal=True, **options), 1e-12)


@random_examples(60)
@given(data=st.data(), seen=st.integers(2, 90), window=st.integers(1, 80), global_tokens=st.integers(0, 5))
def test_any_chunks_equal_the_whole(data, seen, window, global_tokens):
    cuts = sorted(data.draw(st.sets(st.integers(1, seen - 1))))
    batch, kv_heads = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4]))
    holes = torch.rand(batch, seen, generator=torch.Generator().manual_seed(seen)) > 0.4
    mask = data.draw(st.sampled_from([None, holes]))
    bias = data.draw(st.sampled_from([None, make_bias(seen)]))
    inputs = make_inputs(seen, batch=batch, kv_heads=kv_heads)
    options = {"window": window, "global_tokens": global_tokens, "bias": bias}
    out, _ = in_steps(inputs, cuts, mask, **options)
    assert_close(out, local_attention(*inputs, mask, causal=True, **options), 1e-12)


@pytest.mark.parametrize("global_tokens", [0, 3])
def test_local_decoding_has_the_gradients_of_the_whole(global_tokens):
    inputs, bias, mask = make_inputs(60), make_bias(60), padding_mask("left", 2, 60)
    options = {"window": 9, "global_tokens": global_tokens}
    grads = []
    for stepwise in (True, False):
        *given, own_bias = leaves(*inputs, bias)
        if stepwise:
            out, _ = in_steps(given, (7, 40, 41, 42), mask, own_bias, **options)
        else:
            out = local_attention(*given, mask, causal=True, bias=own_bias, **options)
        grads.append(torch.autograd.grad(out.square().sum(), [*given, own_bias]))
    for actual, expected in zip(*grads, strict=True):
        assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("global_tokens", [0, 2])
def test_padding_is_inert_in_a_state(junk, global_tokens):
    inputs, mask = make_inputs(60), padding_mask("left", 2, 60)
    mask[:, 50] = False
    padded = ~mask[:, None, :, None]
    poisoned = (inputs[0], *(tensor.masked_fill(padded, junk) for tensor in inputs[1:]))
    options = {"window": 9, "global_tokens": global_tokens}
    for cuts in ((30,), (30, 55), range(1, 60)):
        out, states = in_steps(inputs, cuts, mask, **options)
        actual, actual_states = in_steps(poisoned, cuts, mask, **options)
        assert torch.equal(actual, out)
        for state, expected in zip(actual_states[-1], states[-1], strict=True):
            assert torch.equal(state, expected)


@pytest.mark.parametrize("global_tokens", [0, 3])
def test_a_local_state_is_as_large_as_its_window(global_tokens):
    """Tokens, and bytes of storage: a view of the prompt would keep all of it in memory."""

    def held(state):
        return sum(tensor.untyped_storage().nbytes() for tensor in state)

    options = {"window": 20, "global_tokens": global_tokens}
    for cuts in (range(1, 150), (140,), (130, 149)):
        _, states = in_steps(make_inputs(150), cuts, **options)
        for end, state in zip([*cuts, 150], states, strict=True):
            assert state[0].shape[2] == state[1].shape[2] == state[2].shape[1] == min(19, end)
        assert held(states[-1]) <= held(in_steps(make_inputs(19), (), **options)[1][0]) * 20 / 19


def test_what_a_local_state_must_tell_apart():
    inputs, mask = make_inputs(60), torch.ones(2, 60, dtype=torch.bool)
    mask[:, 28] = False
    plain, _ = in_steps(inputs, (30, 31), window=9)
    for changed in ({"window": 8}, {"window": 9, "global_tokens": 1}, {"window": 9, "key_mask": mask}):
        assert (in_steps(inputs, (30, 31), **changed)[0][:, :, 31:] - plain[:, :, 31:]).abs().max() > 1e-3, changed
    bias = make_bias(60)
    far = bias.clone()
    far[..., :40] += 1.0  # the keys more than 19 back
    with_bias, changed = (in_steps(inputs, (30, 31), bias=b, window=9, global_tokens=1)[0] for b in (bias, far))
    assert (changed - with_bias)[:, :, 31:].abs().max() > 1e-3  # the global token is seen at its true distance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_local_state_keeps_its_dtype(dtype):
    inputs = make_inputs(60, dtype=dtype)
    options = {"window": 9, "global_tokens": 1}
    out, states = in_steps(inputs, (30, 31, 32), **options)
    assert out.dtype == states[-1][0].dtype == dtype
    expected = local_attention(*(tensor.double() for tensor in inputs), causal=True, **options)
    assert_close(out, expected, {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype])


def layer_with(*state, tokens=5):
    layer = StateLayer(LOCAL)
    layer.expect(LOCAL)
    layer.update(torch.zeros(1, 1, tokens, 1), torch.zeros(1, 1, tokens, 1))
    layer.advance(state)
    return layer


def test_a_state_layer_moves_its_rows():
    a, b = torch.arange(6.0).view(3, 2), torch.arange(3)
    layer = layer_with(a, b)
    assert layer.get_seq_length() == 5 and layer.get_max_length() == -1 and layer.get_mask_sizes(2) == (7, 0)
    assert layer.nbytes == 3 * 2 * 4 + 3 * 8
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(layer.state[0], a[[2, 0, 0]]) and torch.equal(layer.state[1], b[[2, 0, 0]])
    layer.batch_select_indices(torch.tensor([0, 1]))
    layer.batch_repeat_interleave(2)
    assert layer.state[1].tolist() == [2, 2, 0, 0]
    layer.offload()
    layer.prefetch()
    assert layer.state[1].tolist() == [2, 2, 0, 0]
    layer.reset()
    assert layer.state is None and layer.get_seq_length() == 0 and layer.nbytes == 0
    for move in (layer.reorder_cache, layer.batch_select_indices):
        move(torch.tensor([0]))
    layer.batch_repeat_interleave(2)
    assert layer.state is None


def test_a_state_cannot_be_cropped():
    cache = DynamicCache()
    cache.layers = [layer_with(torch.zeros(1)), DynamicLayer()]
    assert not cache.is_croppable and not cache.is_compileable
    for tokens in (-1, 0):
        with pytest.raises(UnsupportedModelError, match=r"take tokens back .* without assistant_model"):
            cache.crop(tokens)


def test_a_state_layer_knows_its_reader():
    layer, key = layer_with(torch.zeros(1)), torch.zeros(1, 1, 2, 1)
    with pytest.raises(UnsupportedModelError, match="Only the model that filled it"):
        layer.update(key, key)
    with pytest.raises(UnsupportedModelError, match=r"state of .*'window': 4.* continued with .*'window': 5"):
        layer.expect(AttentionConfig("local", window=5, global_tokens=1))
    layer.expect(copy.deepcopy(LOCAL))
    layer.update(key, key)  # and then the attention fails, or never hears of the layer
    with pytest.raises(UnsupportedModelError, match="saw 7 tokens, of which only 5 reached its state"):
        layer.expect(LOCAL)
    layer.reset()
    layer.expect(AttentionConfig("linear"))


def ids(length=12, batch=2):
    return torch.randint(3, VOCABULARY, (batch, length))


def types(cache):
    return [type(layer) for layer in cache.layers]


@pytest.fixture
def model():
    """Local, full, local."""
    return convert_attention(make_model("llama"), {0: LOCAL, 2: LOCAL})


CACHES = {
    "none given": lambda model: None,
    "with config": lambda model: DynamicCache(config=model.config),
    "growing": lambda model: DynamicCache(),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=20),
}


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_only_layers_with_a_state_get_a_state_layer(model, make):
    tokens = ids()
    cache = model(tokens[:, :5], past_key_values=make(model), use_cache=True).past_key_values
    full = StaticLayer if isinstance(cache, StaticCache) else DynamicLayer
    assert types(cache) == [StateLayer, full, StateLayer]
    assert all(int(layer.get_seq_length()) == 5 for layer in cache.layers)
    out = model(tokens[:, 5:], past_key_values=cache).logits
    assert_close(out, model(tokens, use_cache=False).logits[:, 5:], 1e-5)


def test_a_module_may_be_given_its_cache_by_position(model):
    attention, hidden = model.model.layers[0].self_attn, torch.randn(2, 6, 16)
    places = model.model.rotary_emb(hidden, torch.arange(6)[None])
    whole, _ = attention(hidden, places)
    cache, outs = DynamicCache(), []
    for start, end in ((0, 3), (3, 6)):
        piece = hidden[:, start:end], tuple(place[:, start:end] for place in places)
        outs.append(attention(*piece, None, cache)[0])
    assert types(cache) == [StateLayer]
    assert_close(torch.cat(outs, 1), whole, 1e-5)


@pytest.mark.parametrize("kind", ["local", "linear", "additive"])
def test_models_that_call_the_cache_otherwise(kind):
    """GPT-NeoX: `layer_past`. It is outside of the table of families."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    stock = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=VOCABULARY)).eval()
    model, tokens, cache = convert_attention(stock, AttentionConfig(kind)), ids(), DynamicCache()
    outs = [model(tokens[:, a:b], past_key_values=cache).logits for a, b in ((0, 5), (5, 6), (6, 12))]
    assert types(cache) == [StateLayer] * 2
    assert_close(torch.cat(outs, 1), model(tokens, use_cache=False).logits, 1e-5)


def test_a_module_that_takes_no_keywords_keeps_an_ordinary_cache():
    class Plain(torch.nn.Module):
        is_causal, layer_idx = True, 0

        def forward(self, hidden, past_key_values=None):
            return past_key_values.update(hidden, hidden, 0)[0]

    module, cache, x = Plain(), DynamicCache(), torch.randn(1, 1, 3, 2)
    attach_cache(module, LOCAL, has_state=True)
    module(x, past_key_values=cache)
    assert module(x, past_key_values=cache).shape[2] == 6 and types(cache) == [DynamicLayer]


def test_a_static_cache_made_in_advance_is_replaced_too(model):
    cache, tokens = StaticCache(config=model.config, max_cache_len=20), ids()
    cache.early_initialization(2, 2, 4, torch.float32, torch.device("cpu"))
    model(tokens, past_key_values=cache)
    assert types(cache) == [StateLayer, StaticLayer, StateLayer]
    cache.reset()
    out = model(tokens, past_key_values=cache).logits
    assert_close(out, model(tokens, use_cache=False).logits, 1e-5)


def test_cross_attention_and_encoders_keep_what_they_have():
    model = convert_attention(make_model("t5"), {"encoder": LOCAL, "decoder": LOCAL})
    out = model(input_ids=ids(), decoder_input_ids=ids(3), use_cache=True)
    cache = out.past_key_values
    assert isinstance(cache, EncoderDecoderCache)
    assert types(cache.self_attention_cache) == [StateLayer] * 3
    assert types(cache.cross_attention_cache) == [DynamicLayer] * 3
    linear = convert_attention(model, {"cross_attention": AttentionConfig("linear")})
    cache = linear(input_ids=ids(), decoder_input_ids=ids(3), use_cache=True).past_key_values
    assert types(cache.cross_attention_cache) == [DynamicLayer] * 3


@pytest.mark.parametrize("kind", ["local", "linear"])
def test_a_cache_that_holds_keys_already_goes_on_as_it_is(kind):
    """Made in training mode, where the model keeps ordinary caches."""
    model, tokens = convert_attention(make_model("llama"), AttentionConfig(kind)), ids()
    cache = model.train()(tokens[:, :5], use_cache=True).past_key_values
    assert types(cache) == [DynamicLayer] * 3
    out = model.eval()(tokens[:, 5:], past_key_values=cache).logits
    assert types(cache) == [DynamicLayer] * 3
    assert_close(out, model(tokens, use_cache=False).logits[:, 5:], 1e-5)


def test_training_with_a_cache_gives_the_gradients_of_training_without(model):
    tokens = ids()
    grads = []
    for use_cache in (True, False):
        model.train().zero_grad()
        model(tokens, labels=tokens, use_cache=use_cache).loss.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for actual, expected in zip(*grads, strict=True):
        assert torch.equal(actual, expected)
    assert max(grad.abs().max() for grad in grads[0]) > 1e-3


@pytest.mark.parametrize("kind", sorted(ATTENTIONS.keys() - {"merging"}))  # which is for encoders
def test_generate_in_training_mode(kind):
    """As training loops do that let the model write: no gradients, and no dropout here."""
    model = convert_attention(make_model("llama"), AttentionConfig(kind))
    options = {"max_new_tokens": 4, "do_sample": False}
    tokens = ids()
    expected = model.generate(tokens, **options)
    assert torch.equal(model.train().generate(tokens, **options), expected)


def test_a_state_is_not_continued_in_training_mode(model):
    cache = model(ids(), use_cache=True).past_key_values
    with pytest.raises(UnsupportedModelError, match="where gradients are recorded"):
        model.train()(ids(1), past_key_values=cache)


def test_a_state_is_for_the_model_that_made_it(model):
    cache = model(ids(), use_cache=True).past_key_values
    with pytest.raises(UnsupportedModelError, match=r"holds a state of 'local' attention"):
        make_model("llama")(ids(1), past_key_values=cache)
    wider = convert_attention(model, {0: AttentionConfig("local", window=5)})
    with pytest.raises(UnsupportedModelError, match=r"cannot be continued with .*'window': 5"):
        wider(ids(1), past_key_values=cache)


def test_a_failed_call_leaves_a_cache_that_says_so(model):
    cache = model(ids(), use_cache=True).past_key_values
    with pytest.raises(UnsupportedModelError, match="keeps no keys to weigh while it decodes"):
        model(ids(1), past_key_values=cache, output_attentions=True)
    with pytest.raises(UnsupportedModelError, match=r"saw 13 tokens, of which only 12 .* Start with a new cache"):
        model(ids(1), past_key_values=cache)


def test_the_first_call_still_has_attention_weights(model):
    tokens = ids()
    with_cache = model(tokens, use_cache=True, output_attentions=True).attentions
    without = model(tokens, use_cache=False, output_attentions=True).attentions
    for actual, expected in zip(with_cache, without, strict=True):
        assert torch.equal(actual, expected)


def test_a_model_with_states_is_copied_and_pickled(model):
    tokens = ids()
    expected = model(tokens, use_cache=False).logits[:, 5:]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            cache = copy.deepcopy(other(tokens[:, :5], use_cache=True).past_key_values)
            assert types(cache) == [StateLayer, DynamicLayer, StateLayer]
            assert_close(other(tokens[:, 5:], past_key_values=cache).logits, expected, 1e-5)


def test_two_threads_do_not_share_a_state(model):
    """What a call decodes from is an argument of the call, nothing that the model remembers."""
    from concurrent.futures import ThreadPoolExecutor

    def decode(tokens):
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            return torch.cat([model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(12)], 1)

    batches = [ids(batch=1) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(decode, batches))
    for out, tokens in zip(outs, batches, strict=True):
        assert_close(out, model(tokens, use_cache=False).logits, 1e-5)


@pytest.fixture
def pair():
    """Local, full."""
    return convert_attention(make_model("llama", num_hidden_layers=2), {0: LOCAL})


def test_the_model_compiles_whole(pair):
    """With a cache, where each of these calls is another graph; without one, tests/models/test_compilation.py."""
    torch._dynamo.reset()
    compiled = torch.compile(pair, fullgraph=True, backend="eager", dynamic=True)
    tokens, cache, outs = ids(12), DynamicCache(config=pair.config), []
    with torch.no_grad():
        for start, end in ((0, 6), (6, 7), (7, 12)):
            piece = tokens[:, start:end].clone()
            torch._dynamo.mark_static(piece, 0)  # only the length is symbolic
            outs.append(compiled(piece, past_key_values=cache).logits)
        assert types(cache) == [StateLayer, DynamicLayer]
        assert_close(torch.cat(outs, 1), pair(tokens, use_cache=False).logits, 1e-5)


def test_a_compiled_static_cache_keeps_its_tensors(pair):
    torch._dynamo.reset()
    compiled = torch.compile(pair, backend="eager")
    tokens, cache, outs = ids(9), StaticCache(config=pair.config, max_cache_len=20), []
    with torch.no_grad():
        for start, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
            outs.append(compiled(tokens[:, start:end], past_key_values=cache).logits)
    assert types(cache) == [StaticLayer] * 2
    assert_close(torch.cat(outs, 1), pair(tokens, use_cache=False).logits, 1e-5)


def test_which_models_decode_from_a_state(model):
    assert decodes_from_state(model)
    assert not decodes_from_state(convert_attention(make_model("t5"), {"encoder": LOCAL}))
    assert not decodes_from_state(make_model("llama"))
    assert variant_of(model.model.layers[0].self_attn).has_state


def test_quantised_layers_give_way_to_a_state(model):
    cache_utils = pytest.importorskip("transformers.cache_utils")
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("a cache quantised without further packages came with transformers 5.23")
    tokens, cache = ids(), cache_utils.QuantizedCache("fp8", model.config)
    model(tokens[:, :5], past_key_values=cache)
    assert types(cache) == [StateLayer, cache_utils.Fp8QuantizedLayer, StateLayer]
    quantised = model(tokens[:, 5:], past_key_values=cache).logits
    assert (quantised - model(tokens, use_cache=False).logits[:, 5:]).abs().max() > 1e-3
    local = convert_attention(model, {1: LOCAL})
    cache = cache_utils.QuantizedCache("fp8", local.config)
    outs = [local(part, past_key_values=cache).logits for part in (tokens[:, :5], tokens[:, 5:])]
    assert_close(torch.cat(outs, 1), local(tokens, use_cache=False).logits, 1e-5)


def test_a_sliding_layer_gives_way_where_all_keys_are_needed():
    """In training mode a converted Mistral layer keeps all keys, whatever the model's window; a stock one slides."""
    model = convert_attention(make_model("mistral", sliding_window=3), {0: AttentionConfig("linear")}).train()
    tokens = ids()
    cache = DynamicCache(config=model.config)
    outs = [model(part, past_key_values=cache).logits for part in (tokens[:, :6], tokens[:, 6:8], tokens[:, 8:])]
    assert types(cache) == [AllKeysLayer] + [DynamicSlidingWindowLayer] * 2
    assert_close(torch.cat(outs, 1), model(tokens, use_cache=False).logits, 1e-5)


def test_a_sliding_layer_that_forgot_tokens_is_refused():
    stock, tokens = make_model("mistral", sliding_window=3), ids()
    model = convert_attention(stock, AttentionConfig("linear"))
    short = stock(tokens[:, :2], use_cache=True).past_key_values
    model(tokens[:, 2:], past_key_values=short)
    assert types(short) == [AllKeysLayer] * 3 and short.layers[0].keys.shape[2] == 12
    long = stock(tokens, use_cache=True).past_key_values
    with pytest.raises(UnsupportedModelError, match="holds the last 2 of 12 tokens"):
        model(ids(1), past_key_values=long)


@pytest.mark.parametrize("kind", ["local", "topk", "linear"])
def test_others_read_the_keys_that_are_kept_or_are_told_that_there_are_none(kind):
    """Of the first layer, whose keys do not depend on attention: those of the stock model."""
    fields = {"local": {"window": 4}, "topk": {"block_size": 2, "top_k": 2}}.get(kind, {})
    model = make_model("llama")
    tokens = ids(9)
    stock = model(tokens, use_cache=True).past_key_values.layers[0]
    cache = convert_attention(model, AttentionConfig(kind, **fields))(tokens, use_cache=True).past_key_values
    layer = cache.layers[0]
    assert isinstance(layer, StateLayer) and layer.is_initialized and layer.get_seq_length() == 9
    assert layer.dtype == stock.dtype and layer.device == stock.device
    if kind == "linear":
        for name in ("keys", "values"):
            with pytest.raises(UnsupportedModelError, match="no keys and values can be read"):
                getattr(layer, name)
        return
    kept = 3 if kind == "local" else 9
    assert layer.keys.shape[2] == kept
    assert_close(layer.keys, stock.keys[:, :, -kept:], 1e-6)
    assert_close(layer.values, stock.values[:, :, -kept:], 1e-6)
    cache.reset()
    assert layer.keys is None and layer.values is None and not layer.is_initialized


def test_whisper_returns_what_it_reads_from_the_cache():
    model, inputs = make_model("whisper"), make_model_inputs("whisper")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "return_dict_in_generate": True}
    windowed = convert_attention(model, {"decoder": AttentionConfig("local", window=3)})
    found = windowed.generate(inputs["input_features"], **options)
    plain = windowed.generate(inputs["input_features"], max_new_tokens=4, min_new_tokens=4)
    assert found["sequences"].shape[0] == 2 and torch.equal(found["sequences"][:, -plain.shape[1] :], plain)
    assert found["past_key_values"].self_attention_cache.layers[0].keys.shape[2] == 2
    linear = convert_attention(model, {"decoder": AttentionConfig("linear")})
    with pytest.raises(UnsupportedModelError, match="return_dict_in_generate=True: leave that out"):
        linear.generate(inputs["input_features"], **options)
