"""Models that spell a sound frame by frame (CTC): which frames are real, and how likely a text is in them.

frames = frames_of(model)
mask = frames.mask(inputs)                                 # [B, frames]: True where a frame is no padding
losses = frames.losses(logits, labels, mask.sum(1))        # [B]: -log of the sum over all spellings of a text
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from .token_masks import IGNORED

SOUNDS = ("input_values", "input_features")
COUNTS = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")  # as transformers calls them


@dataclass(frozen=True)
class Frames:
    """
    Fields:
        count: how many frames are made of so many samples (or features), of a tensor of such numbers.
        blank: the token that says nothing.
        skips_unspellable: a text of more tokens than its sound has frames counts 0, not infinity.
    """

    count: Callable[[Tensor], Tensor]
    blank: int
    skips_unspellable: bool

    def mask(self, inputs: Mapping[str, Any]) -> Tensor:
        """Real frames, bool `[B, frames]`: all, where there is no `attention_mask`."""
        sound = next(inputs[name] for name in SOUNDS if inputs.get(name) is not None)  # [B, samples, ...]
        rows, samples = sound.shape[:2]
        given = inputs.get("attention_mask")
        lengths = torch.full((rows,), samples, device=sound.device) if given is None else given.sum(-1)
        total = int(self.count(torch.tensor([samples])))
        return torch.arange(total, device=sound.device) < self.count(lengths)[:, None]

    def losses(self, logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
        """The negative log-likelihood of each text `[B]` (Graves et al. 2006, Connectionist Temporal Classification).

        Parameters:
            logits: `[B, frames, tokens]`.
            labels: `[B, length]` token ids of what was said, -100 behind them.
            counts: `[B]` how many of the frames are real.
        """
        with torch.backends.cudnn.flags(enabled=False):  # whose sums differ from run to run
            return torch.nn.functional.ctc_loss(
                logits.float().log_softmax(-1).transpose(0, 1),
                labels.clamp_min(0),
                counts,
                (labels != IGNORED).sum(1),
                blank=self.blank,
                reduction="none",
                zero_infinity=self.skips_unspellable,
            )


def frames_of(model: Any) -> Frames:
    """Of a model for CTC.

    Raises:
        UnsupportedModelError: it does not say how many frames a sound becomes.
    """
    count = next((getattr(model, name) for name in COUNTS if hasattr(model, name)), None)
    if count is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has none of {', '.join(COUNTS)}, so its frames of padding are not known. "
            "It can be pruned and converted, but neither distilled nor measured."
        )
    return Frames(count, model.config.pad_token_id, bool(model.config.ctc_zero_infinity))
