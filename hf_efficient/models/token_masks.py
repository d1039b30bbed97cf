"""Which tokens of a batch are real: the one place that losses, scores, statistics and perplexity ask.

    token_masks(inputs, has_decoder=False)["encoder"]      # [batch, length]: True where a token is no padding
    outputs = model(**real_inputs(inputs, model))          # labels and positions that do not count padding

A position counts if it and what it predicts are real. Labels alone cannot tell: of a causal model the first real token
of a row that is padded on the left has a label, and what predicts it is padding.

No result may depend on how far a row is padded, since that is decided by the other rows of its batch. So the positions
of such a row are counted from its first real token, as `generate` does it and a plain forward does not. Under rotary
positions the answer is the same anyway (scores depend on distances), but queries and keys are not, nor is what a
feature map makes of them; under GPT-2's learned positions all of it is another.
"""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from .anatomy import Anatomy
from .registry import is_known, text_config

IGNORED = -100


def token_masks(inputs: Mapping[str, Any], *, has_decoder: bool) -> dict[str, Tensor]:
    """Real tokens by stack, bool `[batch, length]`; `[batch]` where no mask and no token ids are given (images).

    The decoder of an encoder-decoder reads its labels moved by one place, unless it has inputs of its own. Without
    labels of tokens (BART's classifier) it reads the text itself so moved: there a position counts if the token in it
    and the one behind that, which it would predict, are real.
    """
    encoder = _given(inputs, "attention_mask", ("input_ids", "inputs_embeds"))
    if not has_decoder:
        return {"encoder": encoder}
    labels = _decoder_labels(inputs)
    if inputs.get("decoder_attention_mask") is None and labels is not None:
        decoder = labels != IGNORED
    elif any(inputs.get(name) is not None for name in ("decoder_attention_mask", *_DECODER_INPUTS)):
        decoder = _given(inputs, "decoder_attention_mask", _DECODER_INPUTS)
    else:
        decoder = encoder & F.pad(encoder, (1, 0), value=True)[:, :-1] if encoder.dim() == 2 else encoder
    return {"encoder": encoder, "decoder": decoder}


_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


def _given(inputs: Mapping[str, Any], name: str, ids: tuple[str, ...]) -> Tensor:
    mask = inputs.get(name)
    if mask is not None and mask.dim() == 2:
        return mask.bool()
    tensors = (value for value in inputs.values() if torch.is_tensor(value))
    tokens = next((inputs[key] for key in ids if inputs.get(key) is not None), None)
    like, dims = (next(tensors), 1) if tokens is None else (tokens, 2)
    return torch.ones(like.shape[:dims], dtype=torch.bool, device=like.device)


def _decoder_labels(inputs: Mapping[str, Any]) -> Tensor | None:
    """Those of tokens, as `real_inputs` gives them to the model."""
    labels = inputs.get("labels")
    if labels is None or labels.dim() != 2 or labels.is_floating_point():
        return None
    return labels if any(inputs.get(name) is not None for name in _DECODER_INPUTS) else from_first(labels)


def from_first(labels: Tensor) -> Tensor:
    """Labels `[batch, length]` of a decoder, each row moved so that it begins with the first one that counts.

    The decoder starts in front of column 0: between a start and labels that are padded on the left it would read
    padding, which no mask takes from it.
    """
    start = (labels != IGNORED).long().argmax(1, keepdim=True)  # 0 for a row without any
    if not start.any():
        return labels
    columns = torch.arange(labels.shape[1], device=labels.device) + start
    moved = labels.gather(1, columns.clamp(max=labels.shape[1] - 1))
    return moved.masked_fill(columns >= labels.shape[1], IGNORED)


def real_labels(labels: Tensor, mask: Tensor, *, ahead: int) -> Tensor:
    """Token labels with -100 where they, or what predicts them `ahead` positions before, are padding.

    Shapes: labels and mask [batch, length]. A mask of another shape belongs to something else and says nothing here.
    """
    if labels.shape != mask.shape:
        return labels
    before = F.pad(mask, (ahead, 0))[:, : mask.shape[1]]
    return labels.masked_fill(~(mask & before), IGNORED)


def predicts_next(model: PreTrainedModel) -> bool:
    """Whether logits[t] are for labels[t + 1]; GPT2LMHeadModel and its generation have no `loss_type`."""
    kinds = ("ForCausalLM", "ForConditionalGeneration")
    is_causal = model.loss_type in kinds or type(model).__name__.endswith("LMHeadModel")
    return is_causal and not model.config.is_encoder_decoder


def counts_columns(model: PreTrainedModel, names: Collection[str]) -> bool:
    """Whether a plain forward that takes `names` gives the first column position 0, padding or not, and may be told
    better: rotary models and decoders.

    Not BERT and others with learned positions that read both ways, which are to be padded on the right; RoBERTa counts
    its tokens itself, from another number; composite models have positions of more than one dimension.
    """
    config = model.config
    if "position_ids" not in names or config.is_encoder_decoder or text_config(config) is not config:
        return False
    fields = config.to_dict()
    if fields.get("rope_parameters"):
        return True
    if "is_decoder" in fields:
        return False
    if is_known(config):
        return [stack.name for stack in Anatomy.of(model).stacks] == ["decoder"]
    return model.can_generate()


def first_positions(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """`position_ids` counted from the first real token of each row, where one is padded on the left and none are
    given; else nothing."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or inputs.get("position_ids") is not None or bool(mask[:, 0].all()):
        return {}
    start = mask.long().argmax(1, keepdim=True)
    return {"position_ids": (torch.arange(mask.shape[1], device=mask.device) - start).clamp_min(0)}


def masks_of(inputs: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Tensor]:
    """`token_masks` of a model's batch; labels that are classes say nothing of positions."""
    if not _labels_are_tokens(inputs, model):
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
    return token_masks(inputs, has_decoder=model.config.is_encoder_decoder)


def real_inputs(inputs: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """The inputs for a forward whose answer, and whose own loss, do not depend on how far the rows are padded."""
    counted = dict(inputs)
    if _labels_are_tokens(inputs, model):
        mask = list(masks_of(inputs, model).values())[-1]
        labels = _decoder_labels(inputs) if model.config.is_encoder_decoder else inputs["labels"]
        counted["labels"] = real_labels(labels, mask, ahead=int(predicts_next(model)))
    if counts_columns(model, inspect.signature(model.forward).parameters):
        counted |= first_positions(counted)
    return counted


def _labels_are_tokens(inputs: Mapping[str, Any], model: PreTrainedModel) -> bool:
    labels = inputs.get("labels")
    if labels is None or labels.dim() != 2 or labels.is_floating_point():
        return False
    return model.can_generate() or not model.config.is_encoder_decoder
