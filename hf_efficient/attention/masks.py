"""The mask that travels from a model to our attention function: which keys are real, and nothing n x n.

transformers asks the mask function that is registered under the attention's name for a mask. Ours answers with a 2D
bool tensor as wide as there are tokens so far, or None if there is nothing to say. Its content marks padding; its
width says where the queries end, which a static cache, with more keys than the text, does not tell otherwise. A cache
that slides has fewer keys: they belong to the last columns. Causality is not in it: the attention module knows whether
it is causal.
"""

from collections.abc import Callable

import torch
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from ..errors import UnsupportedModelError

# The mask functions that a carrier stands for: attention knows whether it is causal, and its window.
_CARRIED = (
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
)


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

    Where a mask says more than padding, causality and a window, or a model will not do without one, it is a bool mask
    of all pairs `[batch, 1, q_length, width]`.

    Idempotent: `generate` makes the mask for a static cache beforehand, and the model passes it through here again.

    Raises:
        UnsupportedModelError: a mask that is narrower than the tokens, or of pairs in a cache that has forgotten some.
    """
    # Only those that make bidirectional masks, with a window or without, say whether they may be left out.
    bidirectional = mask_function is bidirectional_mask_function or allow_is_bidirectional_skip is not None
    width = kv_length if bidirectional else int(q_offset) + q_length
    is_whole = kv_offset + kv_length == width  # where a static cache is compiled, no mask may be left out either
    wanted = not bidirectional and not allow_is_causal_skip and (q_length > 1 or is_whole)
    if use_vmap or (not torch.compiler.is_compiling() and (wanted or _says_more(mask_function))):
        if kv_offset:
            raise UnsupportedModelError("A mask of all pairs cannot be made for a cache that has forgotten some keys.")
        pairs = sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        return pairs[..., :width]
    if attention_mask is None:
        all_real = width == kv_offset + kv_length
        return None if all_real else torch.ones(batch_size, width, dtype=torch.bool, device=device)
    if attention_mask.ndim == 2 and attention_mask.shape[1] < width and not torch.compiler.is_compiling():
        raise UnsupportedModelError(
            f"attention_mask is {attention_mask.shape[1]} wide for {width} tokens (those in the cache included)."
        )
    return attention_mask if attention_mask.shape[-1] == width else attention_mask[:, :width]


def _says_more(mask_function: Callable) -> bool:
    """Whether a mask function of transformers is made of others than those of padding, causality and windows."""
    name = mask_function.__qualname__
    if name.split(".")[0] in ("and_masks", "or_masks"):
        parts = [cell.cell_contents for cell in mask_function.__closure__ or ()]
        inner = [one for part in parts for one in (part if isinstance(part, tuple | list) else (part,))]
        return any(_says_more(one) for one in inner if callable(one))
    return name.split(".")[0] not in _CARRIED
