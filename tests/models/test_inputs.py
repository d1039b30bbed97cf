import pytest
import torch
from transformers import OPTConfig

from hf_efficient.cli.base import fitting_length as shown_length
from hf_efficient.errors import ConfigError, UnsupportedModelError
from hf_efficient.models.inputs import dummy_inputs
from hf_efficient.models.registry import token_limit
from hf_efficient.pipeline.verify import output_digest
from hf_efficient.pruning.score.calibration import fitting_length

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


@pytest.mark.parametrize("name", ["roberta", "xlm-roberta"])
def test_rows_before_the_first_position_are_not_positions(name):
    """RoBERTa's table has more rows than a text may have tokens: its first position is behind the padding."""
    model = make_model(name, pad_token_id=1)
    limit = model.config.max_position_embeddings - 2
    assert token_limit(model.config) == limit
    with pytest.raises(ConfigError, match=f"{limit} positions"):
        dummy_inputs(model, 1, limit + 1)
    assert model(**dummy_inputs(model, 1, limit))[0].isfinite().all()
    assert fitting_length([], model) == shown_length(model.config, None, 512) == limit
    assert output_digest(model) == output_digest(model)


def test_a_limit_of_rotary_positions_is_what_the_model_was_made_for():
    config = make_model("llama").config
    assert token_limit(config) == config.max_position_embeddings and token_limit(config, rotary=False) is None
    opt = OPTConfig(max_position_embeddings=40)  # no family of the table: as its config says
    assert token_limit(opt) == token_limit(opt, rotary=False) == 40
    assert token_limit(make_model("clip").config) == make_model("clip").config.text_config.max_position_embeddings


@pytest.mark.parametrize("sizes", [(0, 8), (1, 0), (True, 8), (1, 8.0)])
def test_sizes_are_checked(sizes):
    with pytest.raises(ConfigError, match="positive integer"):
        dummy_inputs(bert_classifier(), *sizes)


def test_other_inputs_are_refused():
    model = bert_classifier()
    model.main_input_name = "input_frames"
    with pytest.raises(UnsupportedModelError, match="input_frames"):
        dummy_inputs(model, 1, 8)


@pytest.mark.parametrize(("name", "batch"), [("bert", 1 << 40), ("vit", 1 << 30), ("whisper", 1 << 30)])
def test_inputs_that_no_memory_holds_are_refused_before_they_are_made(name, batch):
    with pytest.raises(ConfigError, match=r"numbers, at most 2,147,483,648 are made\. Lower batch_size"):
        dummy_inputs(make_model(name), batch, 8)
