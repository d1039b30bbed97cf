"""Which half precision this device multiplies faster than float32.

training_arguments(..., **precision_arguments("auto"))      # {"bf16": True} on a processor with AMX, {} on one without
"""

PRECISIONS = ("auto", "bf16", "fp16")


def precision_arguments(wanted: str | None) -> dict[str, bool]:
    """Arguments of `TrainingArguments`. "auto": what the device has units for; None: float32.

    Weights, their updates, losses and normalisations stay float32; only the products are computed in half precision.
    """
    name = _fast_half() if wanted == "auto" else wanted
    return {} if name is None else {name: True}


def _fast_half() -> str | None:
    import torch  # here: recipes are read without it

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private, and no other call asks it of the processor
    return "bf16" if amx is not None and amx() and not torch.backends.mps.is_available() else None
