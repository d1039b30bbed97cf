"""The `efficient` block of config.json: what an efficient model is beside its stock config.

    "efficient": {
      "version": 1,
      "stacks": {"encoder": {"attention": [{"kind": "local", "window": 64}, {"kind": "full"}],
                             "heads": [9, 7], "neurons": [1024, 512]}},
      "kept_layers": {"encoder": [0, 2]}
    }

Only what the stock fields cannot say is in it: an absent list means "as in the stock config". `heads` counts query
heads, `kv_heads` key/value heads, `cross_heads` the heads of cross attention, `neurons` the FFN width, one number for
each layer. `kept_layers` remembers which layers of the original remain; it changes no shape. `kept_heads` says which
query heads of the original each layer has, where a position bias is made once for the heads of all layers. `family`
says where a model keeps what, if that was derived and is not in the table of families. All of it is checked when read,
and bounded by the stock sizes, before any memory is allocated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from ..attention.config import AttentionConfig
from ..errors import ConfigError, shown, unknown_name
from .family import NEURON_KINDS, Family
from .stacks import ConfigStack, config_stacks, said

VERSION = 1
ATTENTIONS = ("attention", "cross_attention")
KEPT_HEADS = "kept_heads"
SIZES = ("heads", "kv_heads", "cross_heads", *NEURON_KINDS)

# The largest stock sizes that are accepted when an efficient config is read: above any real model, so that a broken or
# hostile config.json is refused before anything is allocated.
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 18
MAX_NEURONS = 1 << 20
MAX_HEADS = 4096
MAX_ROWS = 1 << 24
MAX_PIXELS = 1 << 14
LIMITS = dict.fromkeys(("vocab_size", "decoder_vocab_size", "type_vocab_size", "num_labels"), MAX_ROWS)
LIMITS |= dict.fromkeys(("max_position_embeddings", "max_source_positions"), MAX_ROWS)
LIMITS |= dict.fromkeys(("embedding_size", "projection_dim", "pooler_output_size", "classifier_proj_size"), MAX_WIDTH)
LIMITS |= dict.fromkeys(("image_size", "patch_size"), MAX_PIXELS)
LIMITS |= dict.fromkeys(("num_channels", "num_mel_bins", "relative_attention_num_buckets"), MAX_HEADS)
LIMITS |= dict.fromkeys(("encoder_stride", "mlp_ratio"), MAX_LAYERS)
MAY_BE_NONE = ("type_vocab_size", "projection_dim")  # 0: there is no such table (DeBERTa, DPR)


@dataclass(frozen=True)
class StackBlock:
    """One stack: an attention for each layer (empty: all full), also for cross attention, and the sizes that differ
    from the stock config; and of heads that share what the model makes for all of them, which are left."""

    attention: tuple[AttentionConfig, ...] = ()
    cross_attention: tuple[AttentionConfig, ...] = ()
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    kept_heads: tuple[tuple[int, ...], ...] = ()

    def is_converted(self) -> bool:
        return any(config.kind != "full" for config in (*self.attention, *self.cross_attention))


@dataclass(frozen=True)
class EfficientBlock:
    """The parsed block. `EfficientBlock.from_dict(config.efficient)` reads it, `to_dict()` writes it."""

    stacks: dict[str, StackBlock] = field(default_factory=dict)
    kept_layers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    family: Family | None = None

    def is_trivial(self) -> bool:
        """True if the stock class says it all: no converted attention, no size of its own, no gap."""
        has_gaps = self.family is not None and any(stack.places is not None for stack in self.family.stacks)
        return not has_gaps and not any(stack.sizes or stack.is_converted() for stack in self.stacks.values())

    def is_converted(self) -> bool:
        return any(stack.is_converted() for stack in self.stacks.values())

    def stack(self, name: str) -> StackBlock:
        return self.stacks.get(name, StackBlock())

    def to_dict(self) -> dict[str, Any]:
        stacks = {}
        for name, stack in self.stacks.items():
            attention = {
                name: [config.resolve(causal=False).to_dict() for config in getattr(stack, name)]
                for name in ATTENTIONS
                if any(config.kind != "full" for config in getattr(stack, name))
            }
            entry = attention | {size: list(values) for size, values in stack.sizes.items()}
            entry |= {KEPT_HEADS: [list(heads) for heads in stack.kept_heads]} if stack.kept_heads else {}
            if entry:
                stacks[name] = entry
        block: dict[str, Any] = {"version": VERSION, "stacks": stacks}
        if self.kept_layers:
            block["kept_layers"] = {name: list(layers) for name, layers in self.kept_layers.items()}
        if self.family is not None:
            block["family"] = self.family.to_dict()
        return block

    @classmethod
    def from_dict(cls, data: Any) -> "EfficientBlock":
        """Parse without knowing the model; `check_block` then compares with the stock sizes."""
        if not isinstance(data, dict):
            raise ConfigError(f"The `efficient` entry of config.json must be a mapping, got {type(data).__name__}.")
        version = data.get("version", VERSION)
        if version != VERSION or isinstance(version, bool):
            raise ConfigError(
                f"The `efficient` entry of config.json has version {shown(version)}, this hf_efficient reads version "
                f'{VERSION}. Upgrade it: pip install -U "hf-efficient".'
            )
        _known_keys("key of the `efficient` entry", data, ("version", "stacks", "kept_layers", "family"))
        stacks = {name: _read_stack(name, entry) for name, entry in _mapping("stacks", data.get("stacks", {})).items()}
        kept_layers = {
            name: _places(f"kept_layers.{name}", layers)
            for name, layers in _mapping("kept_layers", data.get("kept_layers", {})).items()
        }
        family = Family.from_dict(data["family"]) if data.get("family") is not None else None
        return cls(stacks=stacks, kept_layers=kept_layers, family=family)


def check_block(block: EfficientBlock, config: PreTrainedConfig, family: Family) -> None:
    """Compare the block with the stock config it belongs to.

    Raises:
        ConfigError: a stack the family does not have, a list whose length is not the number of layers, a size that is
            larger than the stock size, heads that do not fit their key/value heads or each other.
    """
    stacks = {stack.name: stack for stack in config_stacks(config, family)}
    for where, names in (("stacks", block.stacks), ("kept_layers", block.kept_layers)):
        for name in names:
            if name not in stacks:
                raise unknown_name(f"stack of a {family.model_type} model in efficient.{where}", name, stacks)
    for name, stack in stacks.items():
        _check_places(stack)
        entry, layers = block.stack(name), stack.depth
        lists: dict[str, tuple] = {f"stacks.{name}.{size}": values for size, values in entry.sizes.items()}
        lists |= {f"stacks.{name}.{KEPT_HEADS}": entry.kept_heads} if entry.kept_heads else {}
        lists |= {f"stacks.{name}.{key}": getattr(entry, key) for key in ATTENTIONS if getattr(entry, key)}
        if entry.cross_attention and not stack.cross:
            raise ConfigError(f"efficient.stacks.{name}.cross_attention: this stack has no cross attention.")
        if name in block.kept_layers:
            lists[f"kept_layers.{name}"] = block.kept_layers[name]
        for where, values in lists.items():
            if len(values) != layers:
                raise ConfigError(f"efficient.{where} has {len(values)} entries for {layers} layers.")
        for index, attention in enumerate(entry.attention):
            if attention.kind != "full" and index not in stack.attending:
                raise ConfigError(f"efficient.stacks.{name}.attention[{index}]: this layer has no softmax attention.")
        _check_sizes(entry, stack)
        _check_heads(entry, stack)


def _check_places(stack: ConfigStack) -> None:
    places, where = stack.entry.places, f"efficient.family: the places of the layers of {stack.name}"
    if places is None:
        return
    whole = said(stack.sizes, stack.entry.num_layers)
    if not places or list(places) != sorted(set(places)) or places[-1] >= whole:
        raise ConfigError(f"{where} must be numbers from 0 to {whole - 1} in rising order, got {shown(places)}.")
    if stack.entry.gaps is None:
        raise ConfigError(f"{where} need `gaps` beside them.")


def _check_sizes(entry: StackBlock, stack: ConfigStack) -> None:
    limits = dict.fromkeys((kind for kind, attention in stack.attentions.items() if attention.query), stack.num_heads)
    limits |= {"kv_heads": stack.num_kv_heads} if limits else {}
    limits |= {kind: stack.width_of(kind) for kind in stack.ffns}
    for size, values in entry.sizes.items():
        if size not in limits:
            raise unknown_name(f"key of efficient.stacks.{stack.name}", size, limits)
        for layer, value in enumerate(values):
            if not 1 <= value <= limits[size]:
                raise ConfigError(
                    f"efficient.stacks.{stack.name}.{size}[{layer}] is {value}; allowed: 1 to {limits[size]}, "
                    "the stock size of this model."
                )


def _check_heads(entry: StackBlock, stack: ConfigStack) -> None:
    group, family, where = stack.group_size, stack.family, f"efficient.stacks.{stack.name}"
    heads, kv_heads = entry.sizes.get("heads"), entry.sizes.get("kv_heads")
    if heads is None and kv_heads is not None:
        raise ConfigError(f"{where}.kv_heads needs `heads` beside it, one number for each layer.")
    lacks = entry.kept_heads if heads is None else not entry.kept_heads and stack.entry.attention.shared
    if lacks or (entry.kept_heads and not stack.entry.attention.shared):
        raise ConfigError(f"{where}: `kept_heads` and `heads` belong together, where a bias is shared.")
    if heads is None:
        return
    if entry.kept_heads and any(
        len(kept) != count or kept[-1] >= stack.num_heads for kept, count in zip(entry.kept_heads, heads, strict=True)
    ):
        raise ConfigError(f"{where}.kept_heads must name as many of {stack.num_heads} heads as `heads` says.")
    expected = tuple(count // group for count in heads)
    if any(count % group for count in heads) or (kv_heads or heads) != expected:
        raise ConfigError(
            f"{where}: heads {heads} need kv_heads {expected}: this model has {group} query heads for each key/value "
            "head, and whole groups are kept."
        )
    if family.relative_bias and len(set(heads)) > 1:
        raise ConfigError(
            f"{where}.heads is {heads}; all layers of a {family.model_type} stack share one relative position bias, "
            "so they must have the same number of heads."
        )


def check_stock_sizes(fields: Mapping[str, Any], family: Family | None) -> None:
    """Refuse sizes that no real model has; `fields` are those of a config that has computed nothing from them yet.

    Raises:
        ConfigError: a size that is not an integer from 1 to its limit; key/value heads that do not divide the heads.
    """
    limit = family.max_positions if family else None
    _check_limits(fields, LIMITS | ({limit: MAX_ROWS} if limit else {}))
    for stack in family.stacks if family else ():
        sizes = fields
        for name in stack.config.split(".") if stack.config else ():  # it may still be what config.json holds
            part = sizes.get(name) or {}
            sizes = vars(part) if isinstance(part, PreTrainedConfig) else _mapping("a sub-config", part)
        limits = {stack.num_layers: MAX_LAYERS, stack.hidden: MAX_WIDTH, stack.heads: MAX_HEADS}
        widths = (stack.neurons, *(ffn.neurons for ffn in stack.more_ffns))
        limits |= {width: MAX_NEURONS for width in widths if width}
        limits |= {name: limit for name, limit in ((stack.kv_heads, MAX_HEADS), (stack.head_dim, MAX_WIDTH)) if name}
        _check_limits(sizes, LIMITS | limits)
        kv_heads = sizes.get(stack.kv_heads) if stack.kv_heads else None
        if kv_heads and sizes.get(stack.heads, 0) % kv_heads:
            raise ConfigError(f"config.json has {stack.kv_heads}={kv_heads}, which does not divide {stack.heads}.")


def _check_limits(fields: Mapping[str, Any], limits: Mapping[str, int]) -> None:
    for place, limit in limits.items():
        name = place.partition(".")[0]  # of a list every entry
        low = 0 if name in MAY_BE_NONE else 1
        kinds = (int, float) if name in ("mlp_ratio", "max_position_embeddings") else (int,)  # 1200.0: Music Flamingo
        value = fields.get(name)
        for number in value if isinstance(value, list | tuple) else (value,):
            if number is not None and (type(number) not in kinds or not low <= number <= limit):
                raise ConfigError(f"config.json has {name}={shown(value)}; hf_efficient accepts {low} to {limit}.")


def _read_stack(name: str, data: Any) -> StackBlock:
    entry = _mapping(f"stacks.{name}", data)
    _known_keys(f"key of efficient.stacks.{name}", entry, (*ATTENTIONS, *SIZES, KEPT_HEADS))
    sizes = {size: _integers(f"stacks.{name}.{size}", entry[size], low=1) for size in SIZES if size in entry}
    variants = {key: _read_attentions(f"stacks.{name}.{key}", entry.get(key, [])) for key in ATTENTIONS}
    heads = entry.get(KEPT_HEADS, [])
    if not isinstance(heads, list | tuple) or len(heads) > MAX_LAYERS:
        raise ConfigError(f"efficient.stacks.{name}.{KEPT_HEADS} must be a list with one entry for each layer.")
    kept = tuple(_places(f"stacks.{name}.{KEPT_HEADS}[{index}]", one, "heads") for index, one in enumerate(heads))
    return StackBlock(**variants, sizes=sizes, kept_heads=kept)


def _read_attentions(where: str, data: Any) -> tuple[AttentionConfig, ...]:
    if not isinstance(data, list | tuple) or len(data) > MAX_LAYERS:
        raise ConfigError(f"efficient.{where} must be a list with one entry for each layer.")
    attentions = []
    for index, item in enumerate(data):
        try:  # what an older config.json leaves out is 0
            attentions.append(AttentionConfig.from_dict(item).resolve(causal=False))
        except ConfigError as error:
            raise ConfigError(f"efficient.{where}[{index}]: {error}") from error
    return tuple(attentions)


def _mapping(where: str, data: Any) -> dict:
    if not isinstance(data, dict):
        raise ConfigError(f"efficient.{where} must be a mapping, got {type(data).__name__}.")
    return data


def _integers(where: str, data: Any, low: int, high: int = MAX_NEURONS) -> tuple[int, ...]:
    is_list = isinstance(data, list | tuple) and len(data) <= MAX_LAYERS
    if not is_list or not all(type(x) is int and low <= x <= high for x in data):
        raise ConfigError(
            f"efficient.{where} must be a list of at most {MAX_LAYERS} integers from {low} to {high}, got "
            f"{shown(data)}."
        )
    return tuple(data)


def _places(where: str, data: Any, what: str = "layers") -> tuple[int, ...]:
    """Layers or heads of the original, each once and in its order."""
    places = _integers(where, data, low=0, high=MAX_LAYERS - 1)
    if list(places) != sorted(set(places)):
        raise ConfigError(
            f"efficient.{where} must name {what} of the original in rising order, each once, got {shown(data)}."
        )
    return places


def _known_keys(what: str, data: dict, known: tuple[str, ...]) -> None:
    for key in data:
        if key not in known:
            raise unknown_name(what, key, known)
