import pytest
import torch

from hf_efficient.errors import ConfigError, UnsupportedModelError
from hf_efficient.models.inputs import dummy_inputs

from ..families import make_model
from ..measurement.models import POSITIONS, bart_classifier, bert_classifier, gpt2, t5, vit


@pytest.mark.parametrize("make", [bert_classifier, gpt2, t5, bart_classifier, vit])
def test_each_family_runs_on_its_inputs(make):
    model = make().eval()
    inputs = dummy_inputs(model, batch_size=2, sequence_length=12)
    assert model(**inputs).logits.shape[0] == 2
    main = inputs[model.main_input_name]
    assert main.shape == ((2, 1, 8, 8) if make is vit else (2, 12))
    assert ("decoder_input_ids" in inputs) == (make is t5)


def test_the_seed_decides():
    model = bert_classifier()
    first, same, other = (dummy_inputs(model, 2, 16, seed)["input_ids"] for seed in (3, 3, 4))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_special_tokens_are_not_drawn():
    model = gpt2(vocab_size=4, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    assert dummy_inputs(model, 4, 16)["input_ids"].unique().tolist() == [3]


def test_an_encoder_decoder_ends_its_text():
    ids = dummy_inputs(t5(), 2, 12)["input_ids"]
    assert (ids[:, -1] == 1).all() and not (ids[:, :-1] == 1).any()


def test_more_tokens_than_positions_is_an_error():
    with pytest.raises(ConfigError, match=f"sequence_length={POSITIONS + 1}.*{POSITIONS} positions"):
        dummy_inputs(bert_classifier(), 1, POSITIONS + 1)
    assert dummy_inputs(t5(), 1, POSITIONS + 1)["input_ids"].shape == (1, POSITIONS + 1)
    with pytest.raises(ConfigError, match="positions"):
        dummy_inputs(gpt2(), 1, POSITIONS + 1)


@pytest.mark.parametrize("sizes", [(0, 8), (1, 0), (True, 8), (1, 8.0)])
def test_sizes_are_checked(sizes):
    with pytest.raises(ConfigError, match="positive integer"):
        dummy_inputs(bert_classifier(), *sizes)


def test_other_inputs_are_refused():
    model = bert_classifier()
    model.main_input_name = "input_values"
    with pytest.raises(UnsupportedModelError, match="input_values"):
        dummy_inputs(model, 1, 8)


@pytest.mark.parametrize(("name", "batch"), [("bert", 1 << 40), ("vit", 1 << 30), ("whisper", 1 << 30)])
def test_inputs_that_no_memory_holds_are_refused_before_they_are_made(name, batch):
    with pytest.raises(ConfigError, match=r"numbers, at most 2,147,483,648 are made\. Lower batch_size"):
        dummy_inputs(make_model(name), batch, 8)
