"""Convert a checkpoint folder into another one, a few tensors at a time: the weights stay, the config changes.

    convert_folder(StoredModel.open("llama-70b"), block, (), convert_attention, "converted")

That the new attention is reached and gives what it should is tried on a tiny model of the same architecture.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..attention.config import AttentionConfig
from ..attention.dispatch import ATTACHED, make_variant
from ..attention.variant import AttentionVariant
from ..errors import UnsupportedModelError
from ..io.disk import check_empty, clear_disk_errors, new_folder
from ..io.tensors import write_tensors
from ..models.anatomy import Anatomy
from ..models.block import ATTENTIONS, EfficientBlock
from ..models.classes import EfficientMixin, stock_config, with_block
from ..models.derive.tiny import first_tiny, tiny_model
from ..models.on_disk import StoredModel, skeleton
from ..models.rebuild import class_for
from ..models.shards import in_portions, shard_paths, write_beside

Convert = Callable[[PreTrainedModel, AttentionConfig], PreTrainedModel]


def convert_folder(
    stored: StoredModel, block: EfficientBlock, gone: tuple[str, ...], convert: Convert, output_dir: str | os.PathLike
) -> Path:
    """Write the model with another block.

    Parameters:
        gone: how the names of learned parts of attention begin that the block replaces.
        convert: of a tiny model, all layers; it raises where that does not work.
    """
    check_empty(output_dir)
    kinds = {one for entry in block.stacks.values() for key in ATTENTIONS for one in getattr(entry, key) or ()}
    _try_tiny(stored.model, [one for one in kinds if one.kind != "full"], convert)
    config = with_block(stored.model.config, block)
    config = stock_config(config) if block.is_trivial() else config
    converted = skeleton(class_for(stored.model, config), config, stored.model.dtype)
    if converted.can_generate():
        converted.generation_config = stored.model.generation_config
    names = [name for name in stored.names() if not name.startswith(gone)] if gone else stored.names()
    new = _learned(converted, set(names))
    with clear_disk_errors(output_dir, "Then give the same call again."), new_folder(output_dir) as target:
        portions = in_portions(stored, names)
        shards = shard_paths(target, len(portions) + bool(new))
        for shard, portion in zip(shards, portions, strict=False):
            write_tensors(shard, {name: stored.read(name) for name in portion})
        if new:
            write_tensors(shards[-1], new)
        write_beside(converted, stored.folder, target, shards)
    return Path(output_dir)


def _try_tiny(model: PreTrainedModel, kinds: list[AttentionConfig], convert: Convert) -> None:
    kind = model._stock_class if isinstance(model, EfficientMixin) else type(model)

    def tried(config: PreTrainedConfig, whole: bool) -> None:
        tiny = tiny_model(config, kind)
        for one in kinds:
            convert(tiny, one)

    if kinds:
        with torch.inference_mode(False):
            first_tiny(stock_config(model.config), tried)


def _learned(converted: PreTrainedModel, known: set[str]) -> dict[str, torch.Tensor]:
    """What the attentions have that no checkpoint holds yet, as in a new model."""
    new = {}
    usual = torch.get_default_dtype()
    torch.set_default_dtype(converted.dtype)
    try:
        for place, module in converted.named_modules():
            if isinstance(module, AttentionVariant) and place.endswith(f".{ATTACHED}"):
                fresh = make_variant(module.config, module.shape).state_dict()
                new |= {f"{place}.{name}": value for name, value in fresh.items() if f"{place}.{name}" not in known}
    finally:
        torch.set_default_dtype(usual)
    if missing := [name for name in new if name not in converted.state_dict()]:
        raise UnsupportedModelError(f"{missing[0]} has no place in {type(converted).__name__}: load the model whole.")
    return new


def replaced(anatomy: Anatomy, new: EfficientBlock) -> tuple[str, ...]:
    """How the names of the learned parts of attentions begin that the new block replaces."""
    gone = []
    for stack in anatomy.stacks:
        for key, attention in zip(ATTENTIONS, stack.attentions.values(), strict=False):
            before, after = (getattr(block.stack(stack.name), key) for block in (anatomy.block, new))
            for index in range(len(stack.layers)):
                if before and before[index] != (after[index] if after else None):
                    gone.append(f"{stack.layer_prefix(index)}.{attention.module}.{ATTACHED}.")
    return tuple(gone)
