"""The table of losses: what another package adds to it trains, is logged and is checked as what is in it."""

import subprocess
import sys

import pytest
import torch

from hf_efficient.distillation.terms import LOSSES, LayerLoss, OutputLoss, register_loss
from hf_efficient.distillation.trainer import DistillationTrainer
from hf_efficient.errors import ConfigError
from hf_efficient.training.batch import Batch

from .tiny import arguments, collate, examples, make_pair


def absolute(batch, student, teacher, settings):
    mask = batch.soft_mask()
    return (student.logits - teacher.logits)[mask].abs().mean(-1).sum()


def absolute_states(at):
    own, other = at.states()
    return (at.project("absolute_states", own) - other)[at.mask].abs().mean(-1).sum()


def absolute_outputs(at):
    own, other = at.attentions()
    return (at.project("absolute_outputs", own.output) - other.output)[at.mask].abs().mean(-1).sum()


@pytest.fixture
def added():
    before = dict(LOSSES)
    register_loss(OutputLoss("absolute", mask=Batch.soft_mask, total=absolute))
    register_loss(LayerLoss("absolute_states", compare=absolute_states))
    outputs = {"compares": "attentions", "projects_outputs": True}
    register_loss(LayerLoss("absolute_outputs", compare=absolute_outputs, **outputs))
    yield
    LOSSES.clear()
    LOSSES.update(before)


@pytest.mark.parametrize("case", ["bert", "t5"])
def test_a_loss_from_outside_trains_a_step(tmp_path, added, case):
    student, teacher = make_pair(case)
    before = [parameter.detach().clone() for parameter in student.parameters()]
    args = arguments(tmp_path, losses='{"absolute": 1.0, "absolute_states": 2.0, "absolute_outputs": 1.0}')
    trainer = DistillationTrainer(
        student,
        args,
        teacher=teacher,
        train_dataset=examples(case),
        eval_dataset=examples(case),
        data_collator=collate,
    )
    assert set(trainer.pairs) == {"absolute_states", "absolute_outputs"}
    for name in trainer.pairs:  # the teacher is wider
        assert any(place.startswith(name) for place in trainer.projections)
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    for name in ("eval_loss_absolute", "eval_loss_absolute_states", "eval_loss_absolute_outputs", "eval_loss"):
        assert 0 < last[name] < first[name]
    assert any(not torch.equal(old, new) for old, new in zip(before, student.parameters(), strict=True))


def test_names_that_are_taken_or_no_names_are_refused(added):
    for name in ("kd", "absolute", "hidden_encoder", "two words"):
        with pytest.raises(ConfigError, match="cannot name a loss"):
            register_loss(OutputLoss(name, mask=Batch.soft_mask, total=absolute))
    with pytest.raises(ConfigError, match="logits, embeddings, states, attentions"):
        register_loss(OutputLoss("other", compares="outputs", mask=Batch.soft_mask, total=absolute))
    assert list(LOSSES)[-3:] == ["absolute", "absolute_states", "absolute_outputs"]


def test_options_of_losses_are_checked_without_torch():
    program = (
        "import sys\n"
        "from hf_efficient.distillation.options import DistillationOptions\n"
        "from hf_efficient.distillation.terms import check_losses\n"
        "from hf_efficient.stages.distill import DistillStage\n"
        "DistillationOptions(losses={'kd': 1.0}, divergence='jsd', hidden_loss='cosine', pooling='cls')\n"
        "DistillStage(losses={'kd': 1.0}, divergence='reverse', layer_map='last')\n"
        "check_losses(['kd', 'hidden'], headless=False)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
