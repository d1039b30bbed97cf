"""What other software asks of the sizes that are left: groups of 4-bit weights, and devices that share out a layer.

serving(Anatomy.of(small))                     # small may be on the meta device
serving_lines(plan)                            # in words, for a terminal
"""

import math

from torch import nn

from ...models.anatomy import Anatomy
from ...models.groups import output_module
from ..plan import PruningPlan, Serving

GROUPS = (128, 64, 32)  # numbers that share a scale, as torchao, GPTQ and AWQ have them
MOST = 64  # devices


def serving(anatomy: Anatomy) -> Serving | None:
    """By the sizes of the linears; None of what is no decoder."""
    if not anatomy.model.can_generate() or anatomy.model.config.is_encoder_decoder:
        return None
    model, groups = anatomy.model, [group for group in anatomy.groups if group.is_neurons]
    of_neurons = {output_module(model, member) for group in groups for member in group.members}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return Serving(
        int4_group=_largest([linear.in_features for linear in linears]),
        rounded_group=_largest([linear.in_features for linear in linears if linear not in of_neurons]),
        devices=_devices(anatomy),
    )


def _largest(sizes: list[int]) -> int:
    return next((group for group in GROUPS if not any(size % group for size in sizes)), 0)


def _devices(anatomy: Anatomy) -> tuple[int, ...]:
    """The rule of vLLM: each device has as many heads and neurons, and whole key/value heads, some perhaps twice."""
    if anatomy.block.is_converted():
        return ()

    def shared(count: int) -> bool:
        for group in anatomy.groups:
            if group.kind == "heads":
                heads = group.units * anatomy.stack(group.stack).group_size
                if heads % count or (group.units % count and count % group.units):
                    return False
            elif group.is_neurons and group.units % count:
                return False
        return True

    return tuple(count for count in range(1, MOST + 1) if shared(count))


def serving_lines(plan: PruningPlan) -> list[str]:
    """None of what is no decoder, or was planned before they were counted."""
    after = plan.forecast
    if after is None or after.serving is None:
        return []
    fits, rounded, devices = after.serving.int4_group, after.serving.rounded_group, after.serving.devices
    lines = []
    if devices and after.loads_with == "portable":
        over = f"tensor parallel over {', '.join(map(str, devices))} devices"
        lines.append(f"vLLM: a stock class, {over if len(devices) > 1 else 'whose layers are whole on one device'}.")
    elif devices and plan.config is not None and plan.config.allocation != "uniform":
        lines.append("vLLM: no, it wants layers of equal sizes; allocation='uniform' gives them.")
    step = 1 if plan.config is None else plan.config.round_to
    more = f"round_to={math.lcm(step, rounded or 1)} makes those of {rounded} fit"
    if fits:
        lines.append(f"4 bits: groups of {fits} fit{f'; {more}' if rounded > fits else ''}.")
    elif rounded:
        lines.append(f"4 bits: groups of 32 or more do not fit; {more}.")
    else:
        lines.append("4 bits: groups of 32 or more do not fit, whatever round_to is.")
    return lines
