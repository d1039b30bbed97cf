"""Answers in the order of the texts, whatever batches they were run in."""

import copy

import pytest
import torch
from transformers import BertModel

from hf_efficient import ConfigError, DataError, UnsupportedModelError, predict

from ..pruning.tiny_tokenizers import tokenizer_of
from .models import bert_classifier, bert_config, t5

TEXTS = [
    "the fox",
    "she sells sea shells by the sea shore",
    "banana",
    "anna ran an ant farm in havana!",
    "low lower",
    "dog fox",
]


def make():
    torch.manual_seed(0)
    tokenizer = copy.deepcopy(tokenizer_of("bert"))
    model = bert_classifier(vocab_size=len(tokenizer), initializer_range=0.3)
    return model, tokenizer


def test_each_text_gets_the_answer_that_it_gets_alone():
    model, tokenizer = make()
    model.train()
    shapes = []
    handle = model.register_forward_pre_hook(
        lambda m, a, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True
    )
    answers = predict(model, TEXTS, tokenizer, batch_size=2)
    handle.remove()
    assert model.training and [len(shape) for shape in shapes] == [2, 2, 2]
    assert [shape[1] for shape in shapes] == sorted((shape[1] for shape in shapes), reverse=True)
    with torch.no_grad():
        alone = [model.eval()(**tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS]
    assert torch.allclose(torch.stack(answers), torch.stack(alone), atol=1e-5)
    assert torch.stack(alone).std(0).max() > 1e-2  # they differ, so their order counts


def test_answers_by_token_come_without_padding():
    _, tokenizer = make()
    model = BertModel(bert_config(vocab_size=len(tokenizer))).eval()
    answers = predict(model, TEXTS, tokenizer, batch_size=4)
    assert [len(each) for each in answers] == [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    assert [len(each) for each in predict(model, TEXTS, tokenizer, max_length=3)] == [3] * len(TEXTS)
    pairs = predict(model, [("dog", "the sea")], tokenizer)
    assert len(pairs[0]) == len(tokenizer("dog", "the sea")["input_ids"])


def test_errors():
    model, tokenizer = make()
    for texts in ([], "the fox"):
        with pytest.raises(DataError, match="must be a list of strings"):
            predict(model, texts, tokenizer)
    with pytest.raises(UnsupportedModelError, match="call model"):
        predict(t5(), TEXTS, tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(ConfigError, match="no pad_token"):
        predict(model, TEXTS, tokenizer)
