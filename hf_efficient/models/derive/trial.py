"""One stack of a tiny model that is tried, and how what a changed model gives is compared with what it must give.

trial.compare(trial.rebuilt(StackBlock()), wanted, "without some heads")
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..block import EfficientBlock, StackBlock
from ..classes import with_block
from ..family import Family
from ..rebuild import rebuild
from ..stacks import ModelStack
from .compare import distance, outputs_of
from .roles import NotDerivable

TOLERANCE = 1e-4  # of the largest number


@dataclass
class Trial:
    """One stack of a tiny model, and what the model gives for the inputs."""

    stack: ModelStack
    family: Family
    model: PreTrainedModel
    inputs: Mapping[str, Tensor]
    expected: dict[str, Tensor]
    inside: str | None = None

    def looking_inside(self) -> "Trial":
        """The same, that also compares what the last layer of the stack gives: where something is chosen by it, such
        as the patches of BLT or the codes of a sound, not every change shows in what the model gives."""
        inside = self.stack.layer_prefix(len(self.stack.layers) - 1)
        return replace(self, inside=inside, expected=outputs_of(self.model, self.inputs, inside))

    def rebuilt(self, entry: StackBlock, state: dict | None = None, **changes: Any) -> PreTrainedModel:
        block = EfficientBlock(stacks={self.stack.name: entry} if entry != StackBlock() else {}, family=self.family)
        return rebuild(self.model, with_block(self.model.config, block, **changes), state).eval()

    def compare(self, small: PreTrainedModel, wanted: dict[str, Tensor], what: str) -> None:
        """
        Raises:
            NotDerivable: it gives something else than what is wanted.
        """
        outputs = outputs_of(small, self.inputs, self.inside)
        for name, right in wanted.items():
            left = outputs.get(name)
            if left is None or left.shape != right.shape:
                shape = "nothing" if left is None else f"the shape {list(left.shape)}"
                raise NotDerivable(f"{what}, {name} of a tiny model has {shape} instead of {list(right.shape)}")
        worst = distance(outputs, wanted, self.inputs)
        if not worst <= TOLERANCE:
            raise NotDerivable(f"{what}, the output of a tiny model is {worst:.1e} off")

    def matters(self, wanted: dict[str, Tensor]) -> bool:
        return distance(wanted, self.expected, self.inputs) > 10 * TOLERANCE

    def check_matters(self, wanted: dict[str, Tensor], what: str) -> None:
        if not self.matters(wanted):
            raise UnchangedError(f"{what}, the output of a tiny model stays the same")


class UnchangedError(NotDerivable):
    """A change does not show in the output, so that nothing is proven."""
