"""What the linears read on calibration data, collected by forward hooks. Padded tokens do not count.

norms = collect(model, linears, batches, lambda rows: rows.square().sum(0))      # [in] for each linear
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...models.modes import eval_mode
from ...models.token_masks import masks_of, real_inputs
from ...training.progress import told
from ...training.ranks import share, total
from ..cut.linears import DECODER, ENCODER_STATES, MAIN, Linear, module_of
from .calibration import wide
from .handing import Batch


class _Enough(Exception):
    """Ends a forward whose remaining layers are of no use here."""


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    linears: Sequence[Linear],
    batches: Sequence[Batch],
    statistic: Callable[[Tensor], Tensor],
    last_layer: nn.Module | None = None,
) -> dict[Linear, Tensor]:
    """The sum over batches of `statistic(rows)` for each linear; rows is `[tokens, in]`, in at least float32.

    A forward stops behind `last_layer`, if one is named. A linear that no batch reaches is not in the result.
    """
    sums: dict[Linear, Tensor] = {}
    masks: dict[str, Tensor | None] = {}

    def hook(linear: Linear, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows, mask = args[0].reshape(-1, args[0].shape[-1]), masks.get(linear.reads)  # [tokens, in]
        # A mask of another size belongs to something else (frames of sound before they were joined).
        if mask is not None and mask.numel() == len(rows):
            rows = rows[mask.flatten().bool()]
        value = statistic(wide(rows))
        sums[linear] = sums[linear] + value if linear in sums else value

    def stop(*unused: object) -> None:
        raise _Enough

    handles = [module_of(model, linear).register_forward_pre_hook(partial(hook, linear)) for linear in linears]
    handles += [] if last_layer is None else [last_layer.register_forward_hook(stop)]
    try:
        with eval_mode(model):
            for batch in told(share(batches), "calibrate"):
                batch = real_inputs({key: value.to(model.device) for key, value in batch.items()}, model)
                by_stack = masks_of(batch, model)
                masks = {MAIN: by_stack["encoder"], DECODER: by_stack.get("decoder")}
                masks[ENCODER_STATES] = batch.get("encoder_attention_mask")
                with suppress(_Enough):
                    model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return total(sums, linears)
