"""Auto classes by exact class names, as transformers' tables have them."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, PreTrainedModel

from hf_efficient.models.heads import auto_class_of_architecture


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("BertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("EfficientBertForMaskedLM", "AutoModelForMaskedLM"),
        ("MarianMTModel", "AutoModelForSeq2SeqLM"),
        ("EfficientMarianMTModel", "AutoModelForSeq2SeqLM"),
        ("BartForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq"),
        ("FlaubertWithLMHeadModel", "AutoModelForMaskedLM"),
        ("XLNetLMHeadModel", "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("T5EncoderModel", "AutoModelForTextEncoding"),
        ("T5Model", "AutoModel"),
        ("CLIPModel", "AutoModel"),
        ("DPRQuestionEncoder", "AutoModel"),
        ("EfficientNetModel", "AutoModel"),
        ("BertForPreTraining", "AutoModelForPreTraining"),
        ("Wav2Vec2ForCTC", "AutoModelForCTC"),
    ],
)
def test_class_is_found_by_its_exact_name(name, auto):
    assert auto_class_of_architecture(name) == auto
    assert hasattr(transformers, auto)


@pytest.mark.parametrize("name", ["GPT2DoubleHeadsModel", "MyLMHeadModel", "OwnForMaskedLM", "", "Model"])
def test_end_of_a_name_says_nothing(name):
    assert auto_class_of_architecture(name) is None


@pytest.mark.parametrize("auto", ["AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForTokenClassification"])
def test_auto_class_has_the_class_in_its_table(auto):
    kind = getattr(transformers, auto)
    for name in kind._model_mapping._model_mapping.values():
        found = getattr(transformers, auto_class_of_architecture(name))
        values = found._model_mapping._model_mapping.values()
        assert any(name == value or (isinstance(value, tuple) and name in value) for value in values)


def test_registered_class_is_found_while_it_is_registered(monkeypatch):
    class OwnConfig(BertConfig):
        model_type = "own_of_heads"

    class OwnWriter(PreTrainedModel):
        config_class = OwnConfig

        def forward(self, input_ids: torch.Tensor):
            return input_ids

    assert auto_class_of_architecture("OwnWriter") is None
    monkeypatch.setitem(AutoModelForCausalLM._model_mapping._extra_content, OwnConfig, OwnWriter)
    assert auto_class_of_architecture("OwnWriter") == "AutoModelForCausalLM"
    assert auto_class_of_architecture(BertForSequenceClassification.__name__) == "AutoModelForSequenceClassification"
