"""A mixture with fewer experts learns from the whole one."""

import torch

from hf_efficient import DistillationTrainer, PruningConfig, prune
from hf_efficient.models.rebuild import is_portable

from ..pruning.experts.tiny import batches, make
from .tiny import arguments


def test_a_pruned_mixture_is_distilled(tmp_path):
    """Logits, and states of all its layers, which are as many and as wide."""
    teacher = make("qwen3_moe")
    data = batches(teacher)
    student = prune(teacher, PruningConfig(ratio=0.3, granularity="expert"), data)
    assert is_portable(student) and student.config.num_experts < teacher.config.num_experts
    rows = [{"input_ids": row, "labels": row} for batch in data for row in batch["input_ids"].tolist()]
    settings = {"losses": {"kd": 1.0, "hidden": 1.0}, "max_steps": 12, "learning_rate": 3e-3}
    trainer = DistillationTrainer(
        student, arguments(tmp_path, **settings), teacher=teacher, train_dataset=rows, eval_dataset=rows
    )
    assert not trainer.projections
    before = trainer.evaluate()
    weight = student.model.layers[0].mlp.experts.down_proj.detach().clone()
    trainer.train()
    after = trainer.evaluate()
    assert all(after[name] < before[name] for name in ("eval_loss", "eval_loss_kd", "eval_loss_hidden"))
    assert not torch.equal(student.model.layers[0].mlp.experts.down_proj, weight)
