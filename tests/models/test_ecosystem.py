"""Training, adapters and dtypes: what users do with a stock model works on an efficient one."""

import copy
import pickle

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoModelForTokenClassification, BertForMaskedLM, Trainer, TrainingArguments

from hf_efficient import AttentionConfig, UnsupportedModelError, convert_attention
from hf_efficient.attention.dispatch import NAME

from ..families import CASES, VOCABULARY, make_inputs, make_labels, make_model, one_layer
from ..helpers import assert_close

NARROW = AttentionConfig(kind="local", window=2, global_tokens=1)
WIDE = AttentionConfig(kind="local", window=64)


# One family of each way to be built: for what does not depend on the names in the table.
SAMPLE = ["bert", "modernbert", "vit", "clip", "llama", "gpt2", "t5", "bart", "whisper"]
# The stock models of these differ by 0.05 to 0.2 between the precisions.
BFLOAT16 = {"clip_vision_model": 0.3, "qwen3": 0.3, "gemma3_text": 0.6}
WITH_LOSS = [name for name, case in CASES.items() if case.labels]


@pytest.mark.parametrize("name", WITH_LOSS)
def test_the_loss_is_that_of_the_stock_class(name):
    """transformers picks a loss by the name of the class."""
    model, inputs = make_model(name), make_inputs(name, CASES[name].paddings[0]) | make_labels(name)
    wide, narrow = convert_attention(model, WIDE), convert_attention(model, NARROW)
    assert wide(**inputs).loss.item() == pytest.approx(model(**inputs).loss.item(), abs=1e-6)
    assert abs(narrow(**inputs).loss.item() - model(**inputs).loss.item()) > 1e-5


@pytest.mark.cover
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(name, reentrant):
    model = convert_attention(make_model(name, **one_layer(name)), NARROW).train()
    inputs = make_inputs(name) | make_labels(name)
    grads, calls = [], []
    variant = next(module for key, module in model.named_modules() if key.endswith("efficient_attention"))
    variant.register_forward_hook(lambda *args: calls.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        out = model(**inputs)
        (out.loss if "labels" in inputs else out[0].square().mean()).backward()
        grads.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert len(calls) == 3, "once without checkpointing, twice with it"
    assert grads[0].keys() == grads[1].keys()
    for key, expected in grads[0].items():
        assert_close(grads[1][key], expected, 1e-6, f"gradient of {key}")
    assert max(grad.abs().max() for grad in grads[0].values()) > 1e-3


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_the_vocabulary_can_grow(name, tmp_path):
    model = convert_attention(make_model(name, BertForMaskedLM if name == "bert" else None), NARROW)
    inputs = make_inputs(name, "right")
    before = model(**inputs).logits
    model.resize_token_embeddings(VOCABULARY + 9)
    assert torch.equal(model(**inputs).logits[..., :VOCABULARY], before)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.vocab_size == VOCABULARY + 9
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert convert_attention(model, WIDE)(**inputs).logits.shape[-1] == VOCABULARY + 9


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "gpt2", "t5", "bart"])
def test_lora_trains_saves_and_merges(name, tmp_path):
    base = convert_attention(make_model(name), NARROW)
    inputs = make_inputs(name, CASES[name].paddings[0]) | make_labels(name)
    plain = copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=CASES[name].lora, init_lora_weights=False))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    model(**inputs).loss.backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all("lora_" in key for key in changed)

    model.eval()
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    assert_close(loaded.eval()(**inputs).logits, expected, 1e-6)
    merged = model.merge_and_unload()
    assert type(merged) is type(base)
    assert_close(merged(**inputs).logits, expected, 1e-5)
    full = convert_attention(merged, AttentionConfig(kind="full"))
    assert type(full) is CASES[name].head and (full(**inputs).logits - expected).abs().max() > 1e-4


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_equal_and_apart(name, duplicate):
    model, inputs = convert_attention(make_model(name), NARROW), make_inputs(name)
    expected = model(**inputs)[0]
    copied = duplicate(model)
    assert type(copied) is type(model) and copied.config.to_dict() == model.config.to_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(**inputs)[0], expected)
    assert not torch.equal(model(**inputs)[0], expected)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16(name, tmp_path):
    model, inputs = convert_attention(make_model(name, **one_layer(name)), NARROW), make_inputs(name)
    expected = model(**inputs)[0]
    model.save_pretrained(tmp_path)
    low = [
        type(model).from_pretrained(tmp_path, dtype=torch.bfloat16),
        copy.deepcopy(model).to(torch.bfloat16),
        convert_attention(make_like(model, name).to(torch.bfloat16), NARROW),
    ]
    inputs = {key: value.to(torch.bfloat16) if value.is_floating_point() else value for key, value in inputs.items()}
    outs = [one(**inputs)[0] for one in low]
    for one, out in zip(low, outs, strict=True):
        assert {parameter.dtype for parameter in one.parameters()} <= {torch.bfloat16, torch.float32}
        assert out.dtype == torch.bfloat16
        assert 0 < (out.float() - expected).abs().max() < BFLOAT16.get(name, 0.1)
    assert torch.equal(outs[0], outs[2])


def make_like(model, name):
    """The stock model of one layer with the weights of an efficient one."""
    stock = make_model(name, **one_layer(name))
    stock.load_state_dict(model.state_dict())
    return stock


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.hidden])
def test_hidden_states_are_as_many_as_in_the_stock_class(name):
    model, inputs = make_model(name), make_inputs(name)
    stock = model(**inputs, output_hidden_states=True)
    own = convert_attention(model, NARROW)(**inputs, output_hidden_states=True)
    for field in CASES[name].hidden:
        assert len(own[field]) == len(stock[field]) == 4
        assert torch.equal(own[field][0], stock[field][0])
        assert not torch.allclose(own[field][1], stock[field][1], atol=1e-5)


@pytest.mark.parametrize("name", SAMPLE)
def test_the_attention_of_a_converted_model_cannot_be_switched(name, tmp_path):
    model, inputs = convert_attention(make_model(name), NARROW), make_inputs(name)
    expected = model(**inputs)[0]
    for other in ("sdpa", "eager", {"": "sdpa"}):
        with pytest.raises(UnsupportedModelError, match=r"was converted.*To undo the conversion"):
            model.set_attn_implementation(other)
    model.set_attn_implementation(NAME)
    assert torch.equal(model(**inputs)[0], expected)
    model.save_pretrained(tmp_path)
    for other in ("sdpa", "eager"):
        loaded = type(model).from_pretrained(tmp_path, attn_implementation=other)
        assert torch.equal(loaded(**inputs)[0], expected)


def test_trainer_trains_and_saves(tmp_path):
    model = convert_attention(make_model("bert"), NARROW)
    before = copy.deepcopy(model.state_dict())
    rows = {"input_ids": torch.randint(3, VOCABULARY, (4, 6)).tolist(), "labels": torch.ones(4, 6, dtype=int).tolist()}
    settings = {"report_to": "none", "save_strategy": "no", "per_device_train_batch_size": 2, "use_cpu": True}
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=2, learning_rate=0.01, **settings)
    trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_dict(rows))
    result = trainer.train()
    assert result.global_step == 2 and result.training_loss > 0
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    trainer.save_model()
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path)
    inputs = make_inputs("bert")
    assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize(
    "name", [name for name in CASES if name in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING]
)
def test_lora_finds_the_linears_of_the_stock_model_by_itself(name):
    stock, efficient = make_model(name), convert_attention(make_model(name), NARROW)
    adapted = [
        {key for key, _ in get_peft_model(model, LoraConfig(r=2)).named_parameters() if "lora_" in key}
        for model in (stock, efficient)
    ]
    assert adapted[0] and adapted[0] == adapted[1]


def test_frozen_weights_stay_frozen_in_a_conversion():
    model = make_model("bert")
    model.base_model.embeddings.requires_grad_(False)
    converted = convert_attention(model, NARROW)
    frozen = {name for name, parameter in converted.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if ".embeddings." in name} and frozen
