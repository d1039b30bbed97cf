"""A student may be pruned while it learns from a wider teacher."""

import torch

from hf_efficient import PruningCallback, PruningConfig
from hf_efficient.distillation.projections import ATTRIBUTE
from hf_efficient.families import find_stacks

from .test_trainer import ALL, make_trainer
from .tiny import collate, examples


def test_the_student_is_small_at_the_end_and_has_no_projection(tmp_path):
    config = PruningConfig(ratio=0.4, metric="parameters", importance="magnitude", round_to=4)
    trainer = make_trainer(
        "bert", tmp_path, callbacks=[PruningCallback(config, start=0.0, end=0.5, every=1)], losses=ALL, max_steps=4
    )
    before = sum(p.numel() for _, layers in find_stacks(trainer.model) for p in layers.parameters())
    trainer.train()
    after = sum(p.numel() for _, layers in find_stacks(trainer.model) for p in layers.parameters())
    assert after <= 0.6 * before
    assert ATTRIBUTE not in dict(trainer.model.named_children())
    logits = trainer.model.eval()(**collate(examples("bert"))).logits
    trainer.save_model(str(tmp_path / "small"))
    again = type(trainer.model).from_pretrained(tmp_path / "small", dtype=torch.float64).eval()
    assert torch.equal(again(**collate(examples("bert"))).logits, logits)
