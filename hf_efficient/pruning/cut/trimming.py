"""The model side of a smaller vocabulary: which tensors lose rows, and what the config says then.

    small = trim_embeddings(model, kept=(0, 1, 7))
    trimmed = trim(model, kept=(0, 1, 7))              # of a model without weights: what each tensor would lose

Which tensors have a row for each token is not listed anywhere: they are those whose shape changes when the class is
built, without memory, for one token more.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import ConfigError, UnsupportedModelError
from ...models.anatomy import Anatomy
from ...models.classes import with_block
from ...models.family import Family
from ...models.rebuild import check_model, rebuild

_SIZES = ("vocab_size", "decoder_vocab_size")
_ID_TABLES = ("lang_to_id", "task_to_id")  # of Whisper
_FORBIDDEN = ("suppress_tokens", "begin_suppress_tokens")  # what is gone needs no suppressing


@dataclass(frozen=True)
class Trimmed:
    """What changes with the vocabulary: the config, fields of the generation config, and of each tensor with a row for
    each token the axis and the rows that stay."""

    config: PreTrainedConfig
    generation: dict[str, Any]
    rows: dict[str, tuple[int, torch.Tensor]]

    def cut(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What is left of a tensor of the state dict."""
        if name not in self.rows:
            return tensor
        axis, rows = self.rows[name]
        return tensor.index_select(axis, rows.to(tensor.device))


def trim_embeddings(model: PreTrainedModel, kept: Iterable[int]) -> PreTrainedModel:
    """A copy of `model` with the embeddings and output rows of `kept` only, renumbered 0..n-1 in their old order.

    Raises:
        ConfigError: an id that the model does not have, or one missing that its config names.
        UnsupportedModelError: a model without a vocabulary, or with one for each side.
    """
    trimmed = trim(model, kept)
    state = {name: trimmed.cut(name, tensor) for name, tensor in model.state_dict().items()}
    small = rebuild(model, trimmed.config, state)
    for name, value in trimmed.generation.items():
        setattr(small.generation_config, name, value)
    return small


def trim(model: PreTrainedModel, kept: Iterable[int]) -> Trimmed:
    """What `trim_embeddings` does, and raises; the model may be without weights."""
    anatomy = Anatomy.of(check_model(model))
    rows, family = vocabulary_rows(model), anatomy.family
    axes = vocabulary_axes(model)
    ids = check_ids(kept, rows, "kept")
    number = {old: new for new, old in enumerate(ids)}
    missing = {index: name for index, name in named_tokens(model).items() if index not in number}
    if missing:
        index, name = next(iter(missing.items()))
        raise ConfigError(
            f"{len(missing)} tokens are not kept that the model's config names, such as {index} ({name}). "
            "Add named_tokens(model) to what is kept."
        )
    changes = {key: (axis, torch.tensor(ids)) for key, axis in axes.items()}
    own = _own_fields(model.config)
    fields = _renumbered(own, number, rows) | {name: len(ids) for name in _SIZES if name in own}
    if _reads_highest_id(family, own):
        del fields["eos_token_id"]
    elif family.model_type.startswith("clip") and fields["eos_token_id"] == 2:
        raise ConfigError(
            "The end token of a CLIP model must not get the id 2, which has a meaning of its own there. "
            f"Keep one more token before {own['eos_token_id']}."
        )
    if family.positions_after_pad:  # where positions are counted from the padding token (RoBERTa), the tables move
        shift = own["pad_token_id"] - fields["pad_token_id"]
        for path in family.positions:
            table = model.base_model.get_submodule(path)
            key = next(name for name, module in model.named_modules() if module is table)
            changes[f"{key}.weight"] = (0, torch.arange(shift, len(table.weight)))
        assert family.max_positions
        fields[family.max_positions] = getattr(model.config, family.max_positions) - shift
    if own.keys() != model.config.to_dict().keys():
        fields = {"text_config": own | fields}
    generation = _renumbered(model.generation_config.to_dict(), number, rows) if model.can_generate() else {}
    return Trimmed(with_block(model.config, anatomy.block, **fields), generation, changes)


def named_tokens(model: PreTrainedModel) -> dict[int, str]:
    """The ids that config and generation config name, each with a field that does: none of them can go."""
    rows, named = vocabulary_rows(model), {}
    reads_highest = _reads_highest_id(Anatomy.of(model).family, _own_fields(model.config))
    for fields in (_own_fields(model.config), model.generation_config.to_dict() if model.can_generate() else {}):
        for name, value in fields.items():
            if name != "eos_token_id" or not reads_highest:
                named |= dict.fromkeys(_ids_in(name, value), name)
        first = fields.get("no_timestamps_token_id")
        if first is not None:  # Whisper counts its timestamps from here to the end
            named |= dict.fromkeys(range(first, rows), "timestamps")
    return {index: name for index, name in sorted(named.items()) if 0 <= index < rows}


def _ids_in(name: str, value: Any) -> list[int]:
    """The ids in a config field that must stay."""
    if value is None:
        return []
    if name.endswith("_token_id"):
        return list(value) if isinstance(value, list | tuple) else [value]
    if name in _ID_TABLES:
        return list(value.values())
    return [index for _, index in value if index is not None] if name == "forced_decoder_ids" else []


def _renumbered(fields: dict[str, Any], number: dict[int, int], rows: int) -> dict[str, Any]:
    """The fields that name tokens, with their new ids. Bans and biases of tokens that are gone are gone too; numbers
    that were no token (-1) stay."""

    def new(index: int | None) -> int | None:
        return number[index] if index is not None and 0 <= index < rows else index

    changed: dict[str, Any] = {}
    for name, value in fields.items():
        if value is None:
            continue
        if name.endswith("_token_id"):
            changed[name] = [new(index) for index in value] if isinstance(value, list | tuple) else new(value)
        elif name in _ID_TABLES:
            changed[name] = {key: new(index) for key, index in value.items()}
        elif name == "forced_decoder_ids":
            changed[name] = [[place, new(index)] for place, index in value]
        elif name in _FORBIDDEN:
            changed[name] = [number[index] for index in value if index in number] or None
        elif name == "bad_words_ids":
            words = [[number[index] for index in word] for word in value if number.keys() >= set(word)]
            changed[name] = words or None
        elif name == "sequence_bias":
            pairs = value.items() if isinstance(value, dict) else value
            left = [([number[index] for index in word], bias) for word, bias in pairs if number.keys() >= set(word)]
            changed[name] = [[word, bias] for word, bias in left] or None
    return changed


def _own_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of the (sub-)config that has the vocabulary; UnsupportedModelError if none has."""
    fields = config.to_dict()
    own = fields.get("text_config", fields)
    if "vocab_size" not in own:
        raise UnsupportedModelError(
            f"Models of type {config.model_type!r} read no text, so there is no vocabulary to prune. "
            "Prune heads, neurons or layers instead."
        )
    return own


def vocabulary_rows(model: PreTrainedModel) -> int:
    """How many tokens the model has embeddings for; often more than its tokenizer knows."""
    own = _own_fields(model.config)
    if own.get("decoder_vocab_size", own["vocab_size"]) != own["vocab_size"]:
        raise UnsupportedModelError(
            f"This model reads {own['vocab_size']} tokens and writes {own['decoder_vocab_size']} others. "
            "Only models with one vocabulary for both sides can be pruned."
        )
    return own["vocab_size"]


def vocabulary_axes(model: PreTrainedModel) -> dict[str, int]:
    """The tensors of the state dict that have an entry for each token, and on which axis."""
    config = copy.deepcopy(model.config)
    own = config.text_config if "text_config" in config.to_dict() else config
    for name in _SIZES:
        if name in _own_fields(config):
            setattr(own, name, vocabulary_rows(model) + 1)
    with torch.device("meta"):
        larger = type(model)(config).state_dict()
    axes = {}
    for key, value in model.state_dict().items():
        grown = [axis for axis, size in enumerate(larger[key].shape) if size != value.shape[axis]]
        if grown:
            axes[key] = grown[0]
    if not axes:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no embeddings of tokens, so there is nothing to prune."
        )
    return axes


def _reads_highest_id(family: Family, fields: dict[str, Any]) -> bool:
    """True for CLIP models whose config says 2: they take the token with the highest id for the end of the text."""
    return family.model_type.startswith("clip") and fields["eos_token_id"] == 2


def check_ids(ids: Iterable[int], rows: int, name: str) -> list[int]:
    chosen = set(ids)
    strange = [index for index in chosen if type(index) is not int or not 0 <= index < rows]
    if strange:
        raise ConfigError(f"{name} names {strange[0]!r}; the model has the token ids 0 to {rows - 1}.")
    return sorted(chosen)
