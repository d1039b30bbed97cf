"""Calibration texts that the model writes itself."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_efficient import PruningConfig, prune, self_calibration
from hf_efficient.errors import ConfigError, UnsupportedModelError


def llama(**fields) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=50, max_position_embeddings=64, num_key_value_heads=2, **(sizes | fields))
    return LlamaForCausalLM(config).eval()


def test_shapes_seeds_and_what_stays_as_it_was():
    model = llama()
    own, state = model.generation_config, torch.random.get_rng_state()
    first = self_calibration(model, rows=6, length=16, batch_size=4, seed=3)
    assert [tuple(batch["input_ids"].shape) for batch in first] == [(4, 16), (2, 16)]
    assert all(
        batch["attention_mask"].all() and batch["attention_mask"].shape == batch["input_ids"].shape for batch in first
    )
    assert model.generation_config is own and torch.equal(state, torch.random.get_rng_state())
    again, other = (torch.cat([b["input_ids"] for b in self_calibration(model, 6, 16, seed=seed)]) for seed in (3, 4))
    assert torch.equal(torch.cat([batch["input_ids"] for batch in first]), again)
    assert not torch.equal(again, other)


def test_it_writes_what_the_model_says_and_goes_past_the_end():
    """A model that always says the next number, 0 after 49; 2 is its end of text."""
    model = llama(tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(100 * torch.eye(50, 32).roll(0, 0) + torch.randn(50, 32))
        states = model.model.norm(model.model.embed_tokens.weight)
        wanted = torch.eye(50).roll(1, 1)  # row i: token i + 1
        model.lm_head.weight.copy_((torch.linalg.pinv(states) @ (wanted * 200)).T)
        sure = model(torch.arange(50)[:, None]).logits[:, -1].softmax(-1).max(-1).values > 0.999
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.eos_token_id = 2
    ids = torch.cat([batch["input_ids"] for batch in self_calibration(model, 32, 12)])
    follows = ids[:, 1:] == (ids[:, :-1] + 1) % 50
    assert sure.float().mean() > 0.5
    assert follows[sure[ids[:, :-1]]].all()
    assert (ids[:, :-1] == 2).any()


def test_they_calibrate():
    model = llama()
    small = prune(model, PruningConfig(ratio=0.3), self_calibration(model, 8, 16))
    assert small.num_parameters() < model.num_parameters()


@pytest.mark.parametrize(
    ("options", "part"),
    [({"rows": 0}, "rows"), ({"length": 1}, "length"), ({"batch_size": 0}, "batch_size"), ({"length": 65}, "64")],
)
def test_bad_numbers_are_refused(options, part):
    with pytest.raises(ConfigError, match=part):
        self_calibration(llama(), **({"rows": 4, "length": 8} | options))


def test_only_decoders_write():
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    t5 = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    for model in (BertForMaskedLM(BertConfig(**sizes)), T5ForConditionalGeneration(t5)):
        with pytest.raises(UnsupportedModelError, match="only decoders"):
            self_calibration(model, 2, 8)
