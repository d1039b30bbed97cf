"""A model that is lent comes back in the mode it had, each part of it; and no dropout is left on while it is asked."""

import datasets
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, TrainingArguments

from hf_efficient import AttentionConfig, PruningConfig, cache_teacher, convert_attention, prune
from hf_efficient.cli.programs.dry_run import describe
from hf_efficient.distillation.generation import teacher_texts
from hf_efficient.distillation.transfer import transfer_attention
from hf_efficient.models.modes import eval_mode

from .tiny import collate, examples, make_pair, with_adapters
from .training import make_trainer

ROWS = [{"input_ids": [3 + i, 4, 5 + i, 6], "labels": [3 + i, 4, 5 + i, 6]} for i in range(4)]
BATCHES = [{"input_ids": torch.tensor([row["input_ids"] for row in ROWS])}]


def writer():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50, attention_dropout=0.3, pad_token_id=0, eos_token_id=1))


def reader(**fields):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(**sizes | {"vocab_size": 50} | fields))


def mixed(model):
    """In training, with a frozen part in eval mode, as fine-tuning recipes have it."""
    model.train()
    model.base_model.get_input_embeddings().eval()
    next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[1].eval()
    return model


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def in_cache(model, folder):
    cache_teacher(model, datasets.Dataset.from_list(ROWS), folder / "cache", top_k=4)


def in_texts(model, folder):
    teacher_texts(model, datasets.Dataset.from_list(ROWS), max_new_tokens=2, num_beams=1)


def in_conversion(model, folder):
    convert_attention(model, AttentionConfig("local", window=2))


def in_transfer(model, folder):
    model = convert_attention(model, AttentionConfig("linear", feature_map="hedgehog"))
    mixed(model)
    before = modes(model)
    arguments = TrainingArguments(str(folder), max_steps=1, save_strategy="no", report_to="none", use_cpu=True)
    transfer_attention(model, ROWS, arguments)
    assert modes(model) == before


def in_weight_pruning(model, folder):
    prune(
        model, PruningConfig(granularity="weight", ratio=0.5, importance="activation", allocation="uniform"), BATCHES
    )


def in_structured_pruning(model, folder):
    prune(model, PruningConfig(ratio=0.3, round_to=1), BATCHES)


@pytest.mark.parametrize(
    "action", [in_cache, in_texts, in_conversion, in_transfer, in_weight_pruning, in_structured_pruning]
)
def test_every_part_comes_back_in_its_mode(action, tmp_path):
    model = mixed(writer())
    before = modes(model)
    assert {*before.values()} == {True, False}
    action(model, tmp_path)
    assert modes(model) == before


def test_dry_run_leaves_the_student_as_it_is(tmp_path):
    trainer = make_trainer("bert", tmp_path)
    mixed(trainer.model)
    before = modes(trainer.model)
    describe(trainer)
    assert modes(trainer.model) == before


def test_modes_come_back_even_where_they_were_changed_within():
    model = mixed(reader())
    before = modes(model)
    with eval_mode(model):
        assert not any(modes(model).values())
        model.train()
    assert modes(model) == before


@pytest.mark.parametrize("when", ["before", "after"])
def test_teacher_that_trains_has_no_dropout_while_it_teaches(tmp_path, when):
    """Whenever its owner puts it into training mode; which is given back."""
    student, _ = make_pair("bert")
    teacher = reader(num_labels=student.config.num_labels, vocab_size=40).double()
    quiet = make_trainer("bert", tmp_path, pair=(student, teacher.eval()))
    expected = quiet.evaluate()
    if when == "before":
        mixed(teacher)
    trainer = make_trainer("bert", tmp_path, pair=(make_pair("bert")[0], teacher))
    mixed(teacher)
    before = modes(teacher)
    first, second = trainer.evaluate(), trainer.evaluate()
    for name in ("eval_loss", "eval_loss_kd", "eval_teacher_agreement"):
        assert first[name] == second[name] == pytest.approx(expected[name], rel=1e-12)
    trainer.train()
    assert modes(teacher) == before


def test_students_own_base_has_no_dropout_while_it_teaches(tmp_path):
    student = with_adapters(make_pair("bert")[0])
    trainer = make_trainer("bert", tmp_path, pair=(student, None), losses={"kd": 1.0})
    student.train()
    before = modes(student)
    batch = collate(examples("bert"))
    with torch.no_grad():
        answers = [trainer._run_teacher(trainer._batch(dict(batch))).logits for _ in range(2)]
    assert torch.equal(*answers)
    assert modes(student) == before
