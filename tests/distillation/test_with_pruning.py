"""A student may be pruned while it learns from a wider teacher."""

import pytest
import torch

from hf_efficient import DistillationTrainer, PruningCallback, PruningConfig, prune
from hf_efficient.distillation.losses.projections import ATTRIBUTE
from hf_efficient.models.anatomy import Anatomy

from ..families import make_model
from .tiny import arguments, collate, examples
from .training import ALL, make_trainer


def test_the_student_is_small_at_the_end_and_has_no_projection(tmp_path):
    config = PruningConfig(ratio=0.4, metric="parameters", importance="magnitude", round_to=4)
    trainer = make_trainer(
        "bert", tmp_path, callbacks=[PruningCallback(config, start=0.0, end=0.5, every=1)], losses=ALL, max_steps=4
    )
    before = sum(p.numel() for stack in Anatomy.of(trainer.model).stacks for p in stack.layers.parameters())
    trainer.train()
    after = sum(p.numel() for stack in Anatomy.of(trainer.model).stacks for p in stack.layers.parameters())
    assert after <= 0.6 * before
    assert ATTRIBUTE not in dict(trainer.model.named_children())
    logits = trainer.model.eval()(**collate(examples("bert"))).logits
    trainer.save_model(str(tmp_path / "small"))
    again = type(trainer.model).from_pretrained(tmp_path / "small", dtype=torch.float64).eval()
    assert torch.equal(again(**collate(examples("bert"))).logits, logits)


@pytest.mark.parametrize("name", ["bert", "electra", "roberta", "distilbert"])
def test_attention_outputs_of_pruned_heads_are_compared_through_a_projection(name, tmp_path):
    """BERT and ELECTRA give their heads side by side: fewer of them are less wide, though the model is not."""
    teacher = make_model(name)
    student = prune(teacher, PruningConfig(ratio=0.4, importance="magnitude", granularity="head", round_to=1))
    rows = [{"input_ids": [5, 6, 7 + i], "labels": [0, 1, 0]} for i in range(8)]
    settings = {"losses": {"attention_output": 1.0, "hidden": 1.0}, "max_steps": 8, "learning_rate": 0.5}
    trainer = DistillationTrainer(
        student, arguments(tmp_path, **settings), teacher=teacher, train_dataset=rows, eval_dataset=rows
    )
    wide = [linear.weight.shape for linear in trainer.projections.values()]
    gives_heads = name != "distilbert"  # its attention gives the model's width
    assert bool(wide) == gives_heads
    assert all(shape[0] == teacher.config.hidden_size > shape[1] for shape in wide)
    before = trainer.evaluate()["eval_loss_attention_output"]
    trainer.train()
    assert trainer.evaluate()["eval_loss_attention_output"] < before
    assert ATTRIBUTE not in dict(student.named_children())
