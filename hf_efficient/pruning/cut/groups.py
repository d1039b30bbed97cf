"""The old place of `models.groups`, until everything in this room takes an `Anatomy`."""

from transformers import PreTrainedModel

from ...models.anatomy import Anatomy
from ...models.groups import Group, Member, Slice, expand, output_module, output_weight, unit_parameters  # noqa: F401


def find_groups(model: PreTrainedModel) -> list[Group]:
    return list(Anatomy.of(model).groups)
