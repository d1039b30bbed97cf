"""`generate` and `pipeline` on efficient models: they are stock models to everyone who calls them."""

import copy
import itertools
import logging
import os

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertForSequenceClassification,
    CompileConfig,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StaticCache,
    T5ForConditionalGeneration,
    ViTImageProcessorPil,
    pipeline,
    set_seed,
)

from hf_efficient import AttentionConfig, UnsupportedModelError, convert_attention
from hf_efficient.attention.cache import StateLayer
from hf_efficient.attention.registry import ATTENTIONS

from ..attention.tiny import TINY, TINY_JOBS
from ..families import CASES, CAUSAL, TWO_STACKS, VOCABULARY, make_inputs, make_model, position_ids
from ..helpers import THOROUGH, assert_close

NARROW = AttentionConfig(kind="local", window=2, global_tokens=1)
NEW = 6  # tokens: more than a window or block of TINY
LENGTH = {"max_new_tokens": NEW, "min_new_tokens": NEW}


def prompt(name, padding="left"):
    return {key: value for key, value in make_inputs(name, padding).items() if key != "decoder_input_ids"}


@pytest.fixture(params=["llama", "gemma3_text", "gpt2", "t5", "bart", "marian", "whisper"])
def generator(request, tmp_path):
    """A converted model, and itself saved and loaded again."""
    model = convert_attention(make_model(request.param), NARROW)
    model.generation_config.max_new_tokens = 5
    model.save_pretrained(tmp_path)
    return model, type(model).from_pretrained(tmp_path)


@pytest.mark.cover
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": True, "top_k": 10, "temperature": 3.0},
    ],
    ids=["greedy", "beams", "static cache", "sampling"],
)
def test_a_reloaded_model_generates_the_same(generator, options):
    model, loaded = generator
    inputs = prompt(model.config.model_type.removeprefix("efficient_"))
    tokens = []
    for one in (model, loaded):
        set_seed(3)
        tokens.append(one.generate(**inputs, **options, **LENGTH))
    assert torch.equal(*tokens)
    if options["do_sample"]:
        assert not torch.equal(model.generate(**inputs, **options, **LENGTH), tokens[0])


def test_the_generation_config_comes_along(generator):
    for one in generator:
        assert one.generation_config.max_new_tokens == 5 and one.can_generate()


def test_greedy_generation_is_the_same_with_every_cache(generator):
    model, _ = generator
    inputs = prompt(model.config.model_type.removeprefix("efficient_"))
    options = [{}, {"cache_implementation": "static"}, {"use_cache": False}]
    tokens = [model.generate(**inputs, **one, **LENGTH, do_sample=False) for one in options]
    assert torch.equal(tokens[1], tokens[0]) and torch.equal(tokens[2], tokens[0])


def test_a_left_padded_prompt_continues_as_it_does_alone():
    model, inputs = convert_attention(make_model("llama"), NARROW), prompt("llama")
    real = inputs["attention_mask"][0].bool()
    batched = model.generate(**inputs, **LENGTH, do_sample=False)[0, -NEW:]
    alone = model.generate(inputs["input_ids"][:1, real], **LENGTH, do_sample=False)[0, -NEW:]
    assert torch.equal(batched, alone)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    assert not torch.equal(model.generate(**inputs, **LENGTH, do_sample=False)[0, -NEW:], alone)


# Two families with every kind, and every family that generates with one.
JOBS = [job for job in TINY_JOBS if job[0] in ("llama", "t5")]
JOBS += [(family, "local-global") for family in [*CAUSAL, *TWO_STACKS] if family not in ("llama", "t5", "whisper")]
JOBS += [("gpt2", "linear-elu"), ("bart", "linear-elu")]
EXACT = ("gpt2", "bart", "marian", "whisper")  # the norms of the others compute in float32, whatever the dtype

LINEAR, LOCAL = AttentionConfig("linear"), AttentionConfig("local", window=4)
KERNEL = AttentionConfig("kernel", feature_dim=4)
MIXED = {
    "state first": {0: LINEAR, 2: LOCAL},
    "full first": {1: LINEAR},
    "state last": {2: AttentionConfig("local", window=4, global_tokens=2)},
    "without a state first": {0: KERNEL, 2: LOCAL},
    "without a state last": {2: KERNEL},
}


def make(family, name, **fields):
    """A converted model whose learned parts have left their starting values."""
    config = TINY[name] if isinstance(name, str) else name
    model = convert_attention(make_model(family, **fields), {"decoder": config} if family in TWO_STACKS else config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "efficient_attention" in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def generate(model, inputs, **options):
    set_seed(7)
    return model.generate(**inputs, **{"do_sample": False} | LENGTH | options)


def steps(model, inputs, cuts, cache):
    """The logits of the pieces of the last stack's tokens, each fed with the cache of those before."""
    mask = inputs["attention_mask"]
    if model.config.is_encoder_decoder:
        tokens = inputs["decoder_input_ids"]
        given = {"encoder_outputs": model.get_encoder()(inputs["input_ids"], mask), "attention_mask": mask}
        pieces = [{"decoder_input_ids": tokens[:, a:b]} | given for a, b in cuts]
    else:
        places = position_ids(model, mask).get("position_ids")
        pieces = [
            {"input_ids": inputs["input_ids"][:, a:b], "attention_mask": mask[:, :b], "position_ids": places[:, a:b]}
            for a, b in cuts
        ]
    options = {"past_key_values": cache, "use_cache": cache is not None}
    return torch.cat([model(**piece, **options).logits for piece in pieces], 1)


def real(model, inputs, logits):
    return logits if model.config.is_encoder_decoder else logits[inputs["attention_mask"].bool()]


def assert_same(logits, expected, what):
    """To 1e-5 of the largest logit: those of Gemma go up to 6."""
    scale = expected.abs().max()
    assert_close(logits / scale, expected / scale, 1e-5, what)


def new_cache(model, make=lambda model: DynamicCache(config=model.config)):
    cache = make(model)
    return EncoderDecoderCache(cache, DynamicCache()) if model.config.is_encoder_decoder else cache


@pytest.mark.cover
@pytest.mark.parametrize(("family", "name"), JOBS)
@torch.no_grad()
def test_token_by_token_equals_the_whole(family, name):
    model, inputs = make(family, name).double(), make_inputs(family, "left")
    length = inputs["decoder_input_ids" if family in TWO_STACKS else "input_ids"].shape[1]
    whole = real(model, inputs, steps(model, inputs, [(0, length)], None))
    tolerance = 1e-10 if family in EXACT else 1e-5
    for edges in (range(length + 1), (0, 5, 6, length), (0, 2, 4, length - 1, length)):
        cuts = list(itertools.pairwise(edges))
        out = real(model, inputs, steps(model, inputs, cuts, new_cache(model)))
        assert_close(out, whole, tolerance)
    forgetful = real(model, inputs, torch.cat([steps(model, inputs, [cut], None) for cut in cuts], 1))
    assert (forgetful - whole).abs().max() > 1e-3


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
}
if THOROUGH in os.environ:
    WAYS |= {"beam sampling": {"num_beams": 3, "do_sample": True, "top_k": 20}}


@pytest.mark.cover
@pytest.mark.parametrize(("family", "name"), JOBS)
@torch.no_grad()
def test_generation_is_the_same_without_a_cache(family, name):
    model, inputs = make(family, name), prompt(family)
    found = {way: generate(model, inputs, **options) for way, options in WAYS.items()}
    for way, options in WAYS.items():
        assert torch.equal(generate(model, inputs, **options, use_cache=False), found[way]), way
    assert not torch.equal(found["greedy"], found["sampling"][::2])
    assert torch.equal(generate(model, inputs, cache_implementation="static"), found["greedy"])
    if family in CAUSAL:
        for size in (1, 3):
            assert torch.equal(generate(model, inputs, prefill_chunk_size=size), found["greedy"]), size


@pytest.mark.cover
@pytest.mark.parametrize(("family", "name"), [job for job in JOBS if job[0] in CAUSAL])
@torch.no_grad()
def test_rows_of_a_left_padded_batch_continue_as_they_do_alone(family, name):
    model, inputs = make(family, name), prompt(family)
    for chunked in ({}, {"prefill_chunk_size": 3}):
        batched = generate(model, inputs, **chunked)
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            alone = generate(model, {"input_ids": inputs["input_ids"][row : row + 1, mask]})
            assert torch.equal(batched[row, -NEW:], alone[0, -NEW:])


@pytest.mark.cover
@pytest.mark.parametrize(("family", "name"), [job for job in JOBS if job[0] in CAUSAL])
@torch.no_grad()
def test_generation_goes_on_from_a_returned_cache(family, name):
    model, inputs = make(family, name), prompt(family)
    whole = generate(model, inputs, return_dict_in_generate=True, output_logits=True)
    half = {"max_new_tokens": NEW // 2, "min_new_tokens": NEW // 2}
    first = generate(model, inputs, **half, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, NEW // 2, dtype=torch.long)], 1)
    kept = copy.deepcopy(first.past_key_values)
    for cache in (kept, first.past_key_values):
        given = {"input_ids": first.sequences, "attention_mask": mask, "past_key_values": cache}
        second = generate(model, given, **half, return_dict_in_generate=True, output_logits=True)
        assert torch.equal(second.sequences, whole.sequences)
        assert_close(torch.stack(second.logits), torch.stack(whole.logits[NEW // 2 :]), 1e-5)


def held(cache):
    """Bytes of the keys, values and states of every layer of self-attention."""
    layers = getattr(cache, "self_attention_cache", cache).layers
    return sum(one.nbytes if isinstance(one, StateLayer) else one.keys.nbytes + one.values.nbytes for one in layers)


@pytest.mark.cover
@pytest.mark.parametrize(("family", "name"), JOBS)
@torch.no_grad()
def test_a_state_does_not_grow_with_the_text(family, name):
    model, inputs = make(family, name), prompt(family)
    options = {"return_dict_in_generate": True, "use_cache": True}
    sizes = []
    for count in (3, 9):
        length = {"max_new_tokens": count, "min_new_tokens": count}
        sizes.append(held(generate(model, inputs, **options, **length).past_key_values))
    has_state, grows = ATTENTIONS[TINY[name].kind].has_state, TINY[name].kind == "topk"
    assert (sizes[1] == sizes[0]) == (has_state and not grows)
    if has_state and not grows:
        full = generate(make_model(family), inputs, **options, **length).past_key_values
        assert held(full) > sizes[1]


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_decoding_that_takes_tokens_back_is_refused_or_right(name):
    model, inputs = make("llama", name), prompt("llama")
    inputs = {"input_ids": inputs["input_ids"][1:].repeat(1, 2)}
    for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": make_model("llama")}):
        if ATTENTIONS[TINY[name].kind].has_state:
            with pytest.raises(UnsupportedModelError, match="without assistant_model, prompt_lookup_num_tokens"):
                generate(model, inputs, **options)
        else:
            assert torch.equal(generate(model, inputs, **options), generate(model, inputs))
    with pytest.raises(UnsupportedModelError, match="without assistant_model"):
        generate(make_model("llama"), inputs, assistant_model=make("llama", "local"))


CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "growing": lambda model: DynamicCache(),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=20),
}
SHARING = [(name, False, mixing) for name in (*CAUSAL, "bart", "marian") for mixing in MIXED]
SHARING += [(name, True, mixing) for name in CAUSAL if CASES[name].own_window for mixing in MIXED]
SHARING += [("t5", False, "state last")]


@pytest.mark.cover
@pytest.mark.parametrize(("family", "own_window", "mixing"), SHARING)
@torch.no_grad()
def test_layers_of_all_sorts_share_a_cache(family, own_window, mixing):
    """Full layers take their mask from the first layer of their sort, whatever that is; sliding ones have few keys."""
    model = make(family, MIXED[mixing], **(CASES[family].own_window[0] if own_window else {}))
    inputs = make_inputs(family, "left")
    length = inputs["decoder_input_ids" if family in TWO_STACKS else "input_ids"].shape[1]
    unpadded = inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}
    cuts = [(0, 3), *((i, i + 1) for i in range(3, length - 2)), (length - 2, length)]
    for given in (inputs, unpadded):
        whole = real(model, given, steps(model, given, [(0, length)], None))
        for sort, make_cache in CACHES.items():
            if sort == "growing" and own_window:
                continue  # a DynamicCache that knows no config keeps what a sliding layer would forget
            out = steps(model, given, cuts, new_cache(model, make_cache))
            assert_same(real(model, given, out), whole, sort)
    if family in CAUSAL:
        for sort, make_cache in CACHES.items():
            cache, tokens = make_cache(model), inputs["input_ids"]
            outs = [model(tokens[:, a:b], past_key_values=cache).logits for a, b in cuts]
            assert_same(torch.cat(outs, 1), model(tokens, use_cache=False).logits, f"{sort}, without a mask")


@torch.no_grad()
def test_generate_compiles_nothing_that_decodes_from_a_state():
    compiling = GenerationConfig(compile_config=CompileConfig())
    compiling.compile_config._compile_all_devices = True
    for name, expected in (("local", False), ("kernel", True)):
        model = make("llama", name)
        cache = StaticCache(config=model.config, max_cache_len=20)
        assert model._valid_auto_compile_criteria({"past_key_values": cache}, compiling) is expected


def tokenizer(folder):
    """One token for each word `w00` to `w49`."""
    words = {f"w{i:02}": i for i in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w02"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="w00", eos_token="w01", unk_token="w02", padding_side="left"
    )
    made.save_pretrained(folder)
    return made


@pytest.fixture
def errors(caplog, monkeypatch):
    """What transformers logs as an error, such as "The model ... is not supported for ..."."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return lambda: [record.message for record in caplog.records if record.levelno >= logging.ERROR]


TEXTS = ["w05 w06 w07 w08 w09", "w10 w11"]


def test_text_classification_pipeline(tmp_path, errors):
    model = convert_attention(make_model("bert", BertForSequenceClassification), NARROW)
    model.save_pretrained(tmp_path)
    encoded = tokenizer(tmp_path)(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    answers = pipeline("text-classification", model=str(tmp_path))(TEXTS, batch_size=2)
    scores, labels = model(**encoded).logits.softmax(-1).max(-1)
    assert [answer["label"] for answer in answers] == [f"LABEL_{label}" for label in labels]
    assert [answer["score"] for answer in answers] == pytest.approx(scores.tolist(), abs=1e-6)
    assert errors() == []


def test_text_generation_pipeline(tmp_path, errors):
    model = convert_attention(make_model("llama"), NARROW)
    model.save_pretrained(tmp_path)
    words = tokenizer(tmp_path)
    answer = pipeline("text-generation", model=str(tmp_path))(TEXTS[0], do_sample=False, **LENGTH)
    tokens = model.generate(
        **words(TEXTS[0], return_tensors="pt", return_token_type_ids=False), do_sample=False, **LENGTH
    )
    expected = words.decode(tokens[0], skip_special_tokens=True)
    assert answer[0]["generated_text"].replace(" ", "") == expected.replace(" ", "")
    assert errors() == []


def test_image_classification_pipeline(tmp_path, errors):
    model = convert_attention(make_model("vit"), NARROW)
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path)
    image = Image.effect_noise((20, 24), 90).convert("RGB")
    answer = pipeline("image-classification", model=str(tmp_path))(image)
    scores = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    assert {one["label"]: one["score"] for one in answer} == pytest.approx(
        {f"LABEL_{i}": score.item() for i, score in enumerate(scores)}, abs=1e-5
    )
    assert errors() == []


def test_the_error_log_would_show_an_unsupported_model(tmp_path, errors):
    """The twin of the three tests above: a class that the task does not know is logged."""
    model = convert_attention(make_model("t5", T5ForConditionalGeneration), NARROW)
    pipeline("text-generation", model=model, tokenizer=tokenizer(tmp_path))
    assert any("not supported for text-generation" in message for message in errors())
