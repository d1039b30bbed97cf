"""The mask that travels from a model to our attention function: which keys are real, and nothing n x n.

transformers asks the mask function that is registered under the attention's name for a mask. Ours answers with a 2D
bool tensor as wide as there are tokens so far, or None if there is nothing to say. Its content marks padding; its
width says where the queries end, which a static cache, with more keys than the text, does not tell otherwise. A cache
that slides has fewer keys: they belong to the last columns. Causality is not in it: the attention module knows whether
it is causal.
"""

import torch
from transformers.masking_utils import bidirectional_mask_function

from ..errors import UnsupportedModelError


def key_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function=bidirectional_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor | None:
    """The 2D carrier `[batch, width]`, True for a real token, or None if all of `kv_length` keys are real.

    Idempotent: `generate` makes the mask for a static cache beforehand, and the model passes it through here again.

    Raises:
        UnsupportedModelError: packed sequences or a custom mask function, which a 2D mask cannot carry.
    """
    # Only those that make bidirectional masks, with a window or without, say whether they may be left out.
    bidirectional = mask_function is bidirectional_mask_function or allow_is_bidirectional_skip is not None
    if use_vmap:
        raise UnsupportedModelError(
            "Converted attention has no room for a custom mask function (`or_mask_function`, `and_mask_function`). "
            "Leave the layers that need it unconverted in a model of their own, or mask padding only."
        )
    packed = not bidirectional and not allow_is_causal_skip and q_length > 1
    if packed and not torch.compiler.is_compiling():
        raise UnsupportedModelError(
            "Packed sequences (position_ids that restart) are not supported by converted attention. "
            "Give one sequence in each row, with padding and an attention_mask."
        )
    width = kv_length if bidirectional else int(q_offset) + q_length
    if attention_mask is None:
        all_real = width == kv_offset + kv_length
        return None if all_real else torch.ones(batch_size, width, dtype=torch.bool, device=device)
    if attention_mask.ndim == 2 and attention_mask.shape[1] < width and not torch.compiler.is_compiling():
        raise UnsupportedModelError(
            f"attention_mask is {attention_mask.shape[1]} wide for {width} tokens (those in the cache included)."
        )
    return attention_mask if attention_mask.shape[-1] == width else attention_mask[:, :width]
