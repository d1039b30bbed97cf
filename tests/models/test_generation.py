"""`generate` and `pipeline` on efficient models: they are stock models to everyone who calls them."""

import logging

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
    ViTImageProcessorPil,
    pipeline,
    set_seed,
)

from hf_efficient import AttentionConfig, convert_attention

from ..families import VOCABULARY, make_inputs, make_model

NARROW = AttentionConfig(kind="local", window=2, global_tokens=1)
LENGTH = {"max_new_tokens": 8, "min_new_tokens": 8}


def prompt(name, padding="left"):
    inputs = make_inputs(name, padding)
    return {key: inputs[key] for key in ("input_ids", "attention_mask")}


@pytest.fixture(params=["llama", "t5"])
def generator(request, tmp_path):
    """A converted model, and itself saved and loaded again."""
    model = convert_attention(make_model(request.param), NARROW)
    model.generation_config.max_new_tokens = 5
    model.save_pretrained(tmp_path)
    return model, type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": True, "top_k": 10},
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
    batched = model.generate(**inputs, **LENGTH, do_sample=False)[0, -8:]
    alone = model.generate(inputs["input_ids"][:1, real], **LENGTH, do_sample=False)[0, -8:]
    assert torch.equal(batched, alone)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    assert not torch.equal(model.generate(**inputs, **LENGTH, do_sample=False)[0, -8:], alone)


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
