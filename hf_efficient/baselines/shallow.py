"""The first layers of the teacher, with at least the MACs of the result, distilled as the result was.

As DistilBERT is made (Sanh et al. 2019): what whoever does not prune would do. Rounded up, so that it has at least the
result's cost; its stages are the `distill` stages of the recipe, without what they prune.
"""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.disk import own_folder, remove_own
from ..stages.base import Run
from ..stages.distill import DistillStage
from ..training.ranks import on_main
from .base import Baseline, Reader, reader_of, timed_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def layers_for(teacher: "PreTrainedModel", student: "PreTrainedModel", length: int) -> tuple[int, int]:
    """How many of the first layers have at least the MACs of `student`, and how many there are."""
    from ..distillation.student import build_student
    from ..measurement.size import count_macs
    from ..models.anatomy import Anatomy
    from ..models.inputs import dummy_inputs

    def macs(model: Any) -> int:
        return count_macs(model, dummy_inputs(model, 1, length))

    depth = max(len(stack.layers) for stack in Anatomy.of(teacher).stacks)
    whole, one = macs(teacher), macs(build_student(teacher, layers=[0]))
    layer = (whole - one) / max(depth - 1, 1)
    more = (macs(student) - one) / layer if layer > 0 else 0.0
    return min(depth, max(1, 1 + math.ceil(more - 0.01))), depth  # a head that is a little larger is no layer


class Shallow(Baseline):
    """A shallow student of the same cost, trained in the same way."""

    name = "shallow"
    is_shared = True
    of_teacher = False

    def check(self, run: Run) -> None:
        from ..models.anatomy import Anatomy

        Anatomy.of(run.skeleton(run.config))  # raises where it is not known which layers there are

    def make(self, run: Run, student: Path, target: Path) -> dict[str, Any]:
        from transformers import set_seed

        from ..distillation.student import build_student
        from ..models.registry import token_limit

        teacher, small = run.load(run.teacher_folder), run.load(student)
        limits = [token_limit(model.config) for model in (teacher, small)]
        length = min([timed_length(run.recipe, small.config), *(limit for limit in limits if limit is not None)])
        kept, depth = layers_for(teacher, small, length)
        training = [
            dataclasses.replace(step.settings, prune=None)
            for step in run.recipe.stages
            if isinstance(step.settings, DistillStage)
        ]
        folders = [target / f"step-{number}" for number in range(len(training))] + [target]
        on_main(lambda: own_folder(folders[0]))
        start = build_student(teacher, layers=list(range(kept)))
        run.save(start, folders[0])
        for stage, source, goal in zip(training, folders[:-1], folders[1:], strict=True):
            set_seed(run.recipe.seed)
            on_main(lambda: own_folder(goal))  # noqa: B023  (done before the next one)
            stage.run(run, source, goal)
        for folder in folders[:-1]:
            on_main(lambda: remove_own(folder))  # noqa: B023
        done = "distilled as ours" if training else "without training, as the recipe has no distill stage"
        about = f"the first {kept} of {depth} layers, {done}"
        return {"about": about, "layers": kept, "parameters": start.num_parameters()}

    def reader(self, run: Run, folder: Path) -> Reader:
        from ..measurement.size import count_weight_bytes

        model = run.load(folder)
        return reader_of(run, model, count_weight_bytes(model))


SHALLOW = Shallow()
