"""A PEFT student whose teacher is its own base model."""

import copy

import pytest
import torch

from hf_efficient.distillation.adapters import without_adapters
from hf_efficient.errors import ConfigError

from .tiny import bert, collate, examples, make_pair, with_adapters
from .training import make_trainer, weights

LOSSES = {"kd": 1.0, "hidden": 1.0, "relation": 1.0}


def base_with_dropout():
    _, teacher = make_pair("bert")
    for module in teacher.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    return teacher


def test_the_base_teaches_as_a_second_copy_would(tmp_path):
    """The same three steps; only the adapters change."""
    _, teacher = make_pair("bert")
    settings = {"losses": LOSSES, "max_steps": 3}
    apart = make_trainer("bert", tmp_path, pair=(with_adapters(copy.deepcopy(teacher)), teacher), **settings)
    alone = make_trainer("bert", tmp_path, pair=(with_adapters(copy.deepcopy(teacher)), None), **settings)
    assert alone.teacher is None
    before = {name: p.detach().clone() for name, p in alone.model.named_parameters()}
    for trainer in (apart, alone):
        trainer.train()
    assert torch.allclose(weights(alone.model), weights(apart.model), rtol=1e-12)
    changed = {name for name, p in alone.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
    keys = [f"eval_loss_{name}" for name in LOSSES] + ["eval_teacher_agreement"]
    ours, expected = alone.evaluate(), apart.evaluate()
    assert [ours[key] for key in keys] == pytest.approx([expected[key] for key in keys], rel=1e-12)


def test_the_base_answers_without_adapters_and_dropout_and_all_is_put_back():
    model = base_with_dropout()
    expected = copy.deepcopy(model).eval()(**collate(examples("bert"))).logits
    student = with_adapters(model).train()
    student.base_model.model.bert.encoder.layer[0].eval()  # a mode of its own
    modes = {name: module.training for name, module in student.named_modules()}
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    with without_adapters(student) as teacher, torch.no_grad():
        assert torch.equal(teacher(**collate(examples("bert"))).logits, expected)
    assert {name: module.training for name, module in student.named_modules()} == modes
    assert {name for name, p in student.named_parameters() if p.requires_grad} == trained
    student.eval()
    assert not torch.allclose(student(**collate(examples("bert"))).logits, expected)


def test_without_a_teacher_a_student_needs_adapters(tmp_path):
    with pytest.raises(ConfigError, match=r"need a teacher.*a PEFT student learns from its own base"):
        make_trainer("bert", tmp_path, pair=(bert(), None))
    with pytest.raises(ConfigError, match="student and base are one"):
        make_trainer("bert", tmp_path, pair=(with_adapters(bert()), None), teacher_dtype="bfloat16")
