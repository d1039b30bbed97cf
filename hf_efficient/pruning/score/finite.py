"""Numbers that say nothing (nan, inf) are told where they arise, and never compared.

check_weights(model)                                             # before any long work
check_finite(score, "The fisher score of encoder.3.heads")
"""

import torch
from transformers import PreTrainedModel

from ...errors import DataError


def check_weights(model: PreTrainedModel) -> None:
    """DataError names the first parameter that is not finite; one on the meta device has no values to look at."""
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta" or not parameter.is_floating_point():
            continue
        good = int(torch.isfinite(parameter.detach()).sum())
        if good < parameter.numel():
            raise DataError(
                f"The weights of the model are not finite: {name} has {parameter.numel():,} numbers, {good:,} of them "
                "finite. Load an intact checkpoint, or train it again with a lower learning rate."
            )


def check_finite(values: torch.Tensor, what: str) -> None:
    """Raises DataError that begins with `what` where a number is nan or inf."""
    if not torch.isfinite(values).all():
        raise not_finite(what)


def not_finite(what: str, first: str = "") -> DataError:
    """`first`: where it begins, if that is known."""
    begins = f"; it begins with {first}" if first else ""
    return DataError(
        f"{what} is not finite{begins}. Look for nan, inf and very large numbers in the calibration batches, and load "
        "a model of float16 in float32 or bfloat16."
    )
