"""Only what changes no answer leaves; all of that leaves."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_efficient import ConfigError, UnsupportedModelError, free
from hf_efficient.pruning import exact

from ..families import CASES, make_inputs, make_model, real_logits
from ..helpers import assert_close
from .tiny_tokenizers import TEXTS, tokenizer_of


@torch.no_grad()
def silence(model, layer):
    """A Llama layer that adds nothing."""
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=60, num_key_value_heads=2, **sizes | changes)
    return LlamaForCausalLM(config).eval()


def logits(model):
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        return model(input_ids=ids).logits


def saved(freed):
    return {saving.name: saving.count for saving in freed.savings}


def test_what_is_dead_leaves_and_no_answer_changes():
    model = llama()
    with torch.no_grad():
        silence(model, model.model.layers[1])
        model.model.layers[0].mlp.down_proj.weight[:, 3:9] = 0  # never read
        model.model.layers[2].mlp.up_proj.weight[10:12] = 0
        model.model.layers[2].mlp.gate_proj.weight[10:12] = 0  # made of zeros
        model.model.layers[2].self_attn.o_proj.weight[:, 16:] = 0  # of a key/value head with its two queries
    freed = free(model)
    assert saved(freed) == {"layers": 1, "heads": 1, "neurons": 8}
    assert_close(logits(freed.model), logits(model), 1e-6)
    assert freed.model.config.num_hidden_layers == 2 and model.config.num_hidden_layers == 3
    assert model.num_parameters() - freed.model.num_parameters() == sum(each.parameters for each in freed.savings) > 0
    assert freed.savings[0].told.startswith("layers: 1 of 3 add nothing: ")


def test_nothing_leaves_a_model_in_which_all_lives():
    model = llama()
    freed = free(model)
    assert freed.model is model and freed.savings == () and freed.difference == 0
    assert freed.loads_with == "portable"


def test_almost_zero_stays():
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 3] = 1e-30
        silence(model, model.model.layers[1])
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 1e-30
    assert "layers" not in saved(free(model)) and saved(free(model))["neurons"] == 47


def test_one_unit_of_a_dead_block_stays():
    model = llama(num_hidden_layers=1)
    silence(model, model.model.layers[0])
    freed = free(model)
    assert saved(freed) == {"heads": 1, "neurons": 47}
    assert_close(logits(freed.model), logits(model), 1e-6)


def test_a_layer_with_its_norm_behind_the_sum_does_something():
    model = make_model("bert")
    with torch.no_grad():
        for block in (model.bert.encoder.layer[1].attention.output, model.bert.encoder.layer[1].output):
            block.dense.weight.zero_()
            block.dense.bias.zero_()
    assert "layers" not in saved(free(model))


def test_zeros_that_an_activation_makes_something_of_stay(monkeypatch):
    model = make_model("bert", hidden_act="sigmoid")
    with torch.no_grad():
        up = model.bert.encoder.layer[0].intermediate.dense
        up.weight[2:5] = 0
        up.bias[2:5] = 0
        model.bert.encoder.layer[0].output.dense.weight[:, 7] = 0
    freed = free(model)
    assert saved(freed) == {"neurons": 1}
    gelu = make_model("bert")
    with torch.no_grad():
        for parameter in gelu.bert.encoder.layer[0].intermediate.dense.parameters():
            parameter[2:5] = 0
    assert saved(free(gelu)) == {"neurons": 3}


@pytest.mark.parametrize("name", ["modernbert", "gemma3_text", "mistral"])
def test_windows_are_computed_as_windows(name):
    fields, _ = CASES[name].own_window
    model, inputs = make_model(name, **fields), make_inputs(name, "right")
    freed = free(model)
    assert saved(freed)["windows"] >= 1 and freed.loads_with == "plugin"
    assert_close(real_logits(freed.model, inputs), real_logits(model, inputs), 1e-5)
    assert saved(free(freed.model)) == {}  # nothing is left to gain


def test_another_answer_is_an_error(monkeypatch):
    model = llama()
    monkeypatch.setattr(exact, "dead_units", lambda model, group, unmade: {0} if group.is_neurons else set())
    with pytest.raises(UnsupportedModelError, match="gives another answer"):
        free(model)


def test_tokens_of_no_text_leave():
    tokenizer = tokenizer_of("bert")
    model = make_model("bert", vocab_size=len(tokenizer))
    freed = free(model, tokenizer, TEXTS[:1])
    assert saved(freed)["vocabulary"] == len(tokenizer) - len(freed.tokenizer) > 0
    before, after = (
        each(**words(TEXTS[:1], return_tensors="pt")).logits
        for each, words in ((model.eval(), tokenizer), (freed.model.eval(), freed.tokenizer))
    )
    assert_close(after, before, 1e-6)
    for one in ({"tokenizer": tokenizer}, {"texts": TEXTS}):
        with pytest.raises(ConfigError, match="Give both"):
            free(model, **one)
