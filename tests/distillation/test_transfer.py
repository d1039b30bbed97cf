"""Attention transfer: the learned parts come to what is known to be right, and nothing else moves."""

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BartForSequenceClassification,
    LlamaForQuestionAnswering,
    OPTConfig,
    OPTForCausalLM,
)

from hf_efficient import AttentionConfig, ConfigError, UnsupportedModelError, convert_attention
from hf_efficient.attention import registry
from hf_efficient.attention.config import KINDS, Kind
from hf_efficient.attention.engines.parts import full_attention
from hf_efficient.conversion.in_memory import convert_in_memory
from hf_efficient.distillation.transfer import (
    TransferTrainer,
    find_attentions,
    learned_kinds,
    transfer_attention,
    transferring,
)
from hf_efficient.models.anatomy import Anatomy

from ..families import BUILDS, CASES, TWO_STACKS, make_inputs, make_model, real_logits
from ..helpers import assert_close, selected
from ..processes import launch
from .sharpened import KIND, START, Sharpened, arguments, collate, converted, learned, make_trainer, rows

ROOT = Path(__file__).parents[2]
LOCAL = AttentionConfig("local", window=2)


@pytest.fixture(autouse=True)
def _sharpened(monkeypatch):
    monkeypatch.setitem(KINDS, KIND, Kind((), Sharpened))


@pytest.mark.parametrize(("name",), selected([(name,) for name in CASES], lambda name: name in BUILDS))
def test_the_learned_parts_find_what_is_known_to_be_right(name, tmp_path):
    """And nothing else moves, whatever is frozen."""
    trainer = make_trainer(name, tmp_path, max_steps=30, learning_rate=0.1)
    trainer.model.requires_grad_(False)
    next(trainer.model.parameters()).requires_grad_(True)
    start = copy.deepcopy(trainer.model.state_dict())
    flags = {key: parameter.requires_grad for key, parameter in trainer.model.named_parameters()}
    before = trainer.evaluate()
    assert all(value.eq(START).all() for value in learned(trainer.model).values())
    trainer.train()
    after = trainer.evaluate()
    moved = {key for key, value in trainer.model.state_dict().items() if not torch.equal(value, start[key])}
    assert moved == set(learned(trainer.model))
    assert {key: parameter.requires_grad for key, parameter in trainer.model.named_parameters()} == flags
    part = 0.01 if name in BUILDS else 0.1  # those with norms inside their attention come there more slowly
    assert after["eval_transfer_error"] < part * before["eval_transfer_error"]
    assert before["eval_transfer_error"] > 1e-4
    losses = {key for key in after if "transfer_loss" in key}
    assert len(losses) == len(find_attentions(trainer.model)) == (6 if name in (*TWO_STACKS, "clip") else 3)
    assert after["eval_loss"] == pytest.approx(sum(after[key] for key in losses))
    if name in ("bert", "llama", "t5"):  # some heads of others are too near to uniform to tell
        assert max(value.abs().max() for value in learned(trainer.model).values()) < 0.2


@pytest.mark.parametrize("name", CASES)
def test_meanwhile_the_model_computes_what_the_original_does(name):
    fields, _ = CASES[name].own_window or ({}, 0)
    model = make_model(name, **fields)
    everything = AttentionConfig(KIND)
    crossed = {"cross_attention": everything} if name in TWO_STACKS else {}
    asked = {stack.name: everything for stack in Anatomy.of(model).stacks} | crossed
    made, inputs = convert_attention(model, asked), CASES[name].inputs(CASES[name].paddings[0])
    attentions = find_attentions(made)
    masks = dict.fromkeys((attention.stack for attention in attentions.values()), torch.ones(2, dtype=torch.bool))
    with transferring(attentions, masks) as errors:
        assert_close(real_logits(made, inputs), real_logits(model, inputs), 1e-5)
    assert errors.keys() == attentions.keys() and all(error > 0 for error, _ in errors.values())
    assert (real_logits(made, inputs) - real_logits(model, inputs)).abs().max() > 1e-4


def test_a_cache_that_nobody_asked_for_changes_nothing():
    model = make_model("llama", LlamaForQuestionAnswering)  # its forward has no `use_cache` to say no with
    student, inputs = convert_attention(model, AttentionConfig("linear", feature_map="hedgehog")), make_inputs("llama")
    attentions = find_attentions(student)
    with torch.no_grad(), transferring(attentions, {"decoder": inputs["attention_mask"].bool()}) as errors:
        out = student(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    expected = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert_close(out.start_logits, expected.start_logits, 1e-5)
    assert errors.keys() == attentions.keys()
    state = student(input_ids=inputs["input_ids"])  # afterwards it decodes from a state again
    assert (state.start_logits - expected.start_logits).abs().max() > 1e-4


def test_cross_attention_has_learned_parts_of_its_own(tmp_path):
    model = converted("t5", {"decoder": AttentionConfig(KIND), "cross_attention": AttentionConfig(KIND)})
    trainer = make_trainer("t5", tmp_path, model=model)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    names = [f"eval_transfer_loss/decoder.{i}{ending}" for i in range(3) for ending in ("", ".cross")]
    assert {key for key in after if "transfer_loss" in key} == set(names)
    assert all(after[name] < 0.01 * before[name] for name in names)


def test_the_layers_learn_independently(tmp_path):
    """Teacher forcing: what a layer learns does not depend on which other layers are converted, or to what."""
    settings = {"max_steps": 3, "optim": "sgd", "max_grad_norm": 0.0}
    alone = make_trainer("bert", tmp_path, converted(config={2: AttentionConfig(KIND)}), **settings)
    three = {0: AttentionConfig(KIND), 1: LOCAL, 2: AttentionConfig(KIND)}
    mixed = make_trainer("bert", tmp_path, converted(config=three), **settings)
    for trainer in (alone, mixed):
        trainer.train()
    [value] = learned(alone.model).values()
    assert not value.eq(START).any()
    last = [value for key, value in learned(mixed.model).items() if ".2." in key]
    assert torch.equal(last[0], value)
    assert not torch.equal(next(iter(learned(mixed.model).values())), value)


def test_the_loss_is_the_mean_over_real_queries(tmp_path):
    """By hand: the definition, layer by layer, with the hidden states of the original model."""
    trainer = make_trainer("bert", tmp_path)
    batch = collate(rows()[:11])
    original = convert_attention(trainer.model, AttentionConfig()).eval()
    states = original(**batch, output_hidden_states=True).hidden_states
    expected, real = [], batch["attention_mask"].bool()
    for layer, inputs in zip(original.bert.encoder.layer, states, strict=False):
        attention = layer.attention.self
        split = (*inputs.shape[:2], 4, 4)
        query, key, value = (
            project(inputs).view(split).transpose(1, 2)
            for project in (attention.query, attention.key, attention.value)
        )
        outs = [full_attention(q, key, value, real) for q in (query, query * math.exp(START))]
        expected.append((outs[0] - outs[1]).square().mean((1, 3))[real].mean().item())
    metrics = trainer.evaluate()
    found = [metrics[f"eval_transfer_loss/encoder.{index}"] for index in range(3)]
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.cover
@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
@pytest.mark.parametrize("split", [(4, 4), (8, 2)])
def test_the_step_does_not_depend_on_the_split(name, split, tmp_path):
    runs = {}
    for size, accumulation in ((16, 1), split):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        trainer = make_trainer(name, tmp_path, **settings, optim="sgd", learning_rate=10.0, max_grad_norm=1e9)
        trainer.train()
        log = next(entry for entry in trainer.state.log_history if "loss" in entry)
        runs[size] = log, torch.cat([value.flatten() for value in learned(trainer.model).values()])
    (log, weights), (other_log, other_weights) = runs.values()
    assert (weights - START).abs().max() > 1e-3
    assert_close(other_weights, weights, 1e-10)
    for key in (key for key in log if "loss" in key or key in ("grad_norm", "transfer_error")):
        assert other_log[key] == pytest.approx(log[key], rel=1e-6), key


@pytest.mark.processes
def test_two_processes_make_the_step_of_one(tmp_path):
    found = {}
    for processes, size in ((1, 16), (2, 8)):
        out = tmp_path / f"{processes}.safetensors"
        launch("tests.distillation.transfer_driver", out, str(size), count=processes)
        found[processes] = load_file(out)
    assert found[2]["ranks"].shape[0] == 2 and torch.equal(*found[2]["ranks"])
    assert (found[1]["weights"] - START).abs().max() > 1e-3
    assert_close(found[2]["weights"], found[1]["weights"], 1e-10)
    assert_close(found[2]["losses"], found[1]["losses"], 1e-10)


def test_padding_does_not_count(tmp_path):
    def padded(examples):
        """To twice the length of the longest row."""
        batch = collate(examples)
        return {key: nn.functional.pad(value, (0, value.shape[1])) for key, value in batch.items()}

    def unmasked(examples):
        return padded(examples) | {"attention_mask": torch.ones_like(padded(examples)["attention_mask"])}

    losses = []
    for collator in (collate, padded, unmasked):
        trainer = make_trainer("bert", tmp_path)
        trainer.data_collator = collator
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    assert losses[2] != pytest.approx(losses[0], rel=1e-2)


def test_labels_of_whole_texts_say_nothing_about_positions(tmp_path):
    torch.manual_seed(1)
    config = make_model("bart").config
    model = convert_attention(BartForSequenceClassification(config).double(), AttentionConfig(KIND))
    texts = [{"input_ids": torch.tensor([*row["input_ids"], config.eos_token_id])} for row in rows()]

    def labelled(examples):
        return collate(examples) | {"labels": torch.arange(len(examples)) % 2}

    losses = []
    for collator in (collate, labelled):
        trainer = make_trainer("bart", tmp_path, model, texts)
        trainer.data_collator = collator
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1] > 0


def test_dropout_is_off_and_the_mode_comes_back(tmp_path):
    fields = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    weights = []
    for changes in ({}, fields):
        model = converted("bert", **changes).train()
        out = transfer_attention(model, rows(), arguments(tmp_path, max_steps=2), collate)
        assert out is model and model.training
        weights.append(torch.cat([value.flatten() for value in learned(model).values()]))
    assert torch.equal(*weights)
    assert not weights[0].eq(START).any()


def test_after_the_transfer_the_variants_compute_again(tmp_path):
    model, inputs = converted(dtype=torch.float32), make_inputs("bert")
    before = model(**inputs)[0]
    transfer_attention(model, rows(), arguments(tmp_path, max_steps=1), collate)
    exact = convert_attention(model, AttentionConfig())(**inputs)[0]
    after = model(**inputs)[0]
    assert not torch.allclose(after, before) and not torch.allclose(after, exact)
    assert not any("forward" in vars(attention.variant) for attention in find_attentions(model).values())


def test_a_failing_forward_leaves_nothing_behind(tmp_path):
    trainer = make_trainer("bert", tmp_path)
    trainer.data_collator = lambda examples: {"input_ids": torch.full((2, 3), 10**6)}
    flags = {key: parameter.requires_grad for key, parameter in trainer.model.named_parameters()}
    with pytest.raises(IndexError):
        trainer.train()
    assert not any("forward" in vars(attention.variant) for attention in trainer.attentions.values())
    assert {key: parameter.requires_grad for key, parameter in trainer.model.named_parameters()} == flags


def test_resuming_equals_not_having_stopped(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4}
    straight = make_trainer("vit", tmp_path, **settings)
    straight.train()
    again = make_trainer("vit", tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    fresh = make_trainer("vit", tmp_path / "other", **settings | {"max_steps": 3})
    fresh.train()
    for key, value in learned(straight.model).items():
        assert torch.equal(learned(again.model)[key], value)
        assert not torch.equal(learned(fresh.model)[key], value)
    saved = type(straight.model).from_pretrained(tmp_path / "checkpoint-6", dtype=torch.float64)
    assert all(torch.equal(value, learned(straight.model)[key]) for key, value in learned(saved).items())


def test_training_logs_each_attention(tmp_path):
    trainer = make_trainer("bert", tmp_path, max_steps=4, logging_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for log in logs:
        parts = [log[f"transfer_loss/encoder.{index}"] for index in range(3)]
        assert sum(parts) == pytest.approx(log["loss"], rel=1e-4)
        assert 0 < log["transfer_error"] < 1


def test_gradient_checkpointing_changes_nothing(tmp_path):
    weights = []
    for options in ({}, {"gradient_checkpointing": True}):
        trainer = make_trainer("llama", tmp_path, max_steps=2, **options)
        trainer.train()
        weights.append(torch.cat([value.flatten() for value in learned(trainer.model).values()]))
    assert torch.equal(*weights) and not weights[0].eq(START).any()


def test_bfloat16_is_compared_in_float32(tmp_path):
    model = converted(dtype=torch.float32)
    trainer = make_trainer("bert", tmp_path, model, bf16=True, max_steps=20)
    before = trainer.evaluate()["eval_transfer_error"]
    trainer.train()
    assert trainer.evaluate()["eval_transfer_error"] < 0.3 * before
    assert all(value.dtype == torch.float32 for value in learned(model).values())


def test_a_model_with_nothing_to_learn_is_refused(tmp_path):
    own = KIND.replace("_", " ")
    for model in (make_model("bert"), converted(config=LOCAL), converted(config=AttentionConfig("linear"))):
        with pytest.raises(UnsupportedModelError, match=f"nothing to transfer. Kinds that have: .*{own}"):
            make_trainer("bert", tmp_path, model)
    with pytest.raises(UnsupportedModelError, match=r"\(local\) has no learned parts"):
        transfer_attention(converted(config=LOCAL), rows())
    with pytest.raises(UnsupportedModelError, match="not converted"):
        transfer_attention(make_model("bert"), rows())
    assert "local" not in learned_kinds() and "linear" not in learned_kinds()


def test_a_model_that_was_converted_in_memory(tmp_path):
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=32, dropout=0.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20 if parameter.ndim == 2 else 1)
    made = convert_in_memory(model.double(), AttentionConfig(KIND))
    trainer = make_trainer("bert", tmp_path, made)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    names = [f"eval_transfer_loss/model.decoder.layers.{index}.self_attn" for index in range(2)]
    assert {key for key in after if "transfer_loss" in key} == set(names)
    assert after["eval_transfer_error"] < 0.01 * before["eval_transfer_error"]


def test_options_that_cannot_be_honoured_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="torch_compile"):
        make_trainer("bert", tmp_path, torch_compile=True)
    with pytest.raises(ConfigError, match="compute_loss_func"):
        TransferTrainer(converted(), arguments(tmp_path), compute_loss_func=lambda *args: 0)
    with pytest.raises(UnsupportedModelError, match="transformers model is needed"):
        TransferTrainer(nn.Linear(2, 2), arguments(tmp_path))


def test_without_arguments_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = converted(dtype=torch.float32)
    transfer_attention(model, rows(), data_collator=collate)
    assert not all(value.eq(START).all() for value in learned(model).values())
    assert not any(tmp_path.iterdir())


LEARNED = {
    "hedgehog": AttentionConfig("linear", feature_map="hedgehog"),
    "local_linear": AttentionConfig("local_linear", window=2, feature_map="hedgehog"),
    "additive": AttentionConfig("additive"),
    "kernel": AttentionConfig("kernel"),
}


@pytest.mark.cover
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("kind", [kind for kind, config in LEARNED.items() if config.kind in registry.ATTENTIONS])
def test_every_learned_kind_comes_closer(name, kind, tmp_path):
    config = LEARNED[kind]
    model = converted(name, config, dtype=torch.float32)
    trainer = make_trainer(name, tmp_path, model, max_steps=40, learning_rate=0.02)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_transfer_error"] < 0.97 * before["eval_transfer_error"]
    assert after["eval_loss"] < 0.97 * before["eval_loss"]
    assert all(torch.isfinite(value).all() for value in learned(model).values())


def test_hedgehog_comes_much_closer_in_every_layer(tmp_path):
    model = converted(config=AttentionConfig("linear", feature_map="hedgehog"), dtype=torch.float32)
    trainer = make_trainer("bert", tmp_path, model, max_steps=40, learning_rate=0.05)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert all(after[key] < 0.5 * before[key] for key in after if "transfer_loss" in key)
