"""How states get into the cache of a model, and what reads what from it."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, GPTNeoXConfig, GPTNeoXForCausalLM, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from hf_efficient import AttentionConfig, UnsupportedModelError, convert_attention
from hf_efficient.attention.cache import AllKeysLayer, StateLayer, attach_cache
from hf_efficient.attention.dispatch import decodes_from_state, variant_of
from hf_efficient.attention.registry import ATTENTIONS

from ..families import VOCABULARY, make_model
from ..families import make_inputs as make_model_inputs
from ..helpers import assert_close

LOCAL = AttentionConfig("local", window=4, global_tokens=1)


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


@pytest.mark.thorough
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


@pytest.mark.thorough
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
