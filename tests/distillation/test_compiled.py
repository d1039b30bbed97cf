"""compile_student: the same training, and what it rules out."""

import pytest
import torch
from transformers import TrainerCallback

from hf_efficient.distillation.student import build_student
from hf_efficient.errors import ConfigError

from .tiny import arguments, make_pair
from .training import ALL, make_trainer, trained, weights


@pytest.mark.thorough
@pytest.mark.parametrize("case", ["bert", "llama"])
def test_a_compiled_student_learns_the_same(case, tmp_path):
    """And is compiled for its first shapes, not at every step."""
    settings = {"losses": ALL, "max_steps": 6, "per_device_train_batch_size": 4}

    def pair():
        """Of one layer: tracing takes long."""
        student, teacher = make_pair(case)
        return build_student(student, layers=1), teacher

    plain = trained(case, tmp_path, pair=pair(), **settings)
    torch._dynamo.reset()
    trainer = make_trainer(case, tmp_path, pair=pair(), compile_student="eager", **settings)
    graphs = []

    class Count(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    trainer.add_callback(Count())
    trainer.train()
    assert torch.allclose(weights(trainer.model), plain, rtol=1e-9, atol=1e-12)
    assert graphs[0] > 0 and graphs[-1] == graphs[3]
    torch._dynamo.reset()


def test_what_compiling_rules_out(tmp_path):
    for settings, message in (
        ({"compile_student": "inducter"}, "Did you mean 'inductor'"),
        ({"compile_student": "inductor", "losses": {"relation": 1.0}}, "`relation`"),
        ({"torch_compile": True}, "compile_student='inductor'"),
    ):
        with pytest.raises(ConfigError, match=message):
            arguments(tmp_path, **settings)
