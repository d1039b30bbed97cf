"""What is said of one architecture: its stacks of layers, where they keep what, and the config fields with its sizes.

    stack = Stack(name="decoder", layers="decoder.layers", attention=Attention(module="self_attn"))
    Family("opt", "OPTConfig", stacks=(stack,))

Entries are written (`families`), registered by a user, or derived from a tiny model (`derive`). Paths are relative: a
stack's `layers` to the base model, all others to one layer. A stack that a class does not have (`T5EncoderModel` has
no decoder) is left out by `models.stacks`, where the entries meet configs and modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, shown
from .experts import Experts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MAX_STACKS, MAX_NAMES, MAX_TEXT, MAX_NUMBER, MAX_LAYERS = 16, 64, 500, 1 << 20, 1024

# What can be done with a model; each may be refused for itself.
CONVERT, HEADS, NEURONS, LAYERS = ABILITIES = ("convert", "heads", "neurons", "layers")
EXPERTS = "experts"  # may leave too, where there are any


@dataclass(frozen=True)
class Attention:
    """One attention module of a layer; without a path one of which nothing is known.

    `module` is the one that calls transformers' attention interface; the projections are `nn.Linear`s or GPT-2's
    `Conv1D`s; empty where heads cannot be told apart. A path that stands for several of query, key and value is one
    fused linear: its outputs are those of each, one block after another, or `interleaved`, those of one key/value head
    with its queries after another. `head_attributes`, `kv_attributes` and
    `width_attributes` are the integers that the module keeps beside its weights: the numbers of query heads and of
    key/value heads, and heads x head_dim; `kv_width_attributes` the same of the key/value heads.
    `reads_config`: its forward reads the numbers from its config.
    `gates` are linears whose outputs, as many for each head, multiply what the heads give before `output` reads it.
    `wide` are those of query, key and value that give each head a block of another width, as in latent attention or
    with a gate beside the query; `value_size` is the width of a value, where it is not that of a query.
    `per_head` are other parameters inside of the module with as many rows for each query head, such as attention sinks
    and tables of relative positions, and `per_head_dims` the dimensions of these rows (none: the first of each).
    `shared` are arguments of its forward that the model makes once for the heads of all layers, such as a position
    bias, and `shared_dims` their dimensions with the heads: a layer takes what belongs to the heads that it has.
    `class_name`: that of the module; other layers of the stack may have something else in its place. `logits`: its
    scores are capped, or share their softmax with sinks. `uneven`: its values are not as wide as its queries.
    `biased`: its model gives it a bias of its own for all pairs of tokens. `routed`: it computes its attention itself,
    instead of calling the interface, and is watched while it does (`attention.watched`).
    `measure` is the linear that makes the queries of all heads, and nothing else, where no config field says how wide
    they are.
    """

    module: str
    query: str = ""
    key: str = ""
    value: str = ""
    output: str = ""
    interleaved: bool = False
    head_attributes: tuple[str, ...] = ()
    kv_attributes: tuple[str, ...] = ()
    width_attributes: tuple[str, ...] = ()
    kv_width_attributes: tuple[str, ...] = ()
    reads_config: bool = False
    gates: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    value_size: int | None = None
    per_head: tuple[str, ...] = ()
    per_head_dims: tuple[int, ...] = ()
    shared: tuple[str, ...] = ()
    shared_dims: tuple[int, ...] = ()
    class_name: str = ""
    logits: bool = False
    uneven: bool = False
    biased: bool = False
    routed: bool = False
    measure: str = ""

    @property
    def head_parts(self) -> dict[str, int]:
        """The parameters with rows for each query head, and in which dimension."""
        return dict(zip(self.per_head, self.per_head_dims or (0,) * len(self.per_head), strict=True))

    def without_heads(self) -> Attention:
        """The same module, without what tells its heads apart."""
        kept = ("class_name", "logits", "uneven", "biased", "routed", "measure")
        return Attention(self.module, **{name: getattr(self, name) for name in kept})


# What groups of FFN neurons are called: those of the first FFN of a layer, of a mixture of experts, of others.
NEURON_KINDS = ("neurons", "expert_neurons", "neurons_2", "neurons_3", "neurons_4")


@dataclass(frozen=True)
class FFN:
    """One FFN of a layer, in the layers that have it.

    `up` and `down` are the linears that widen and narrow, as in `Stack`; of a mixture of experts they are parameters
    `[experts, ., .]`, of which every expert loses as many neurons: `up_dim` and `down_dim` say where they lie in them,
    and `interleaved` that the gate and what is gated take turns there. `biases` are parameters `[experts, neurons]`
    and `integers` numbers beside the weights that are the width. `neurons` is the config field with the width, or
    `num_neurons` the width itself; `active` the field that says how many experts work for one token.
    """

    kind: str
    up: tuple[str, ...]
    down: str
    neurons: str | None = None
    num_neurons: int | None = None
    up_dim: int = 0
    down_dim: int = 0
    interleaved: bool = False
    biases: tuple[str, ...] = ()
    integers: tuple[str, ...] = ()
    active: str | None = None

    @property
    def has_experts(self) -> bool:
        return self.down_dim > 0


@dataclass(frozen=True)
class Stack:
    """One tower of identical layers, and the config fields with its sizes.

    Fields:
        layers: its ModuleList.
        up, down: the linears of the FFN; `gated_up` and `gated_down` where the config says that it is gated. A path
            that is named twice is one fused linear with a block of outputs for each.
        more_ffns: those beside it: a dense layer may have another FFN than one with experts, and that several.
        experts: the mixture of experts of its layers, where these can leave.
        cross_attention: to the states of another stack; `cross_if` is the config field that says whether the layers
            have it, where they may do without.
        config: the path of the sub-config with the fields below, where a model is made of several (CLIP).
        num_layers, hidden, heads, neurons: fields with the depth, the width, the query heads and the FFN width;
            `depths.1` is an entry of a list. `heads` is empty where nothing is known of any, and `neurons` is `None`
            where no field can say any width.
        count_neurons: the FFN width of a config, where it is not simply in the field.
        kv_heads: the field with the key/value heads, `None` where there are as many as query heads.
        one_kv_head: all query heads share one key/value head, whatever a field says (Falcon); they leave one by one,
            and it stays.
        head_dim: the field through which the stock model accepts a head count that does not fill the hidden size,
            `None` where it accepts none (then pruned heads need the efficient class).
        head_size: the width of a head itself, where the entry belongs to one config and no field says it.
        attending: the layers that have this attention; None: all.
        gaps: a layer that leaves has an empty one in its place (`models.gaps`), which gives a tensor (0) or a tuple of
            so many things; None: those behind it move up.
        places: where the layers that are left stand among the gaps; None: there are none.
        num_neurons: the FFN width itself, where the entry belongs to one config and no field says it.
        causal: its self-attention sees no later tokens; `None`: by its name.
        sees_patches: it reads an image while another stack reads a text, so that its length is not that of the text.
        refusals: of a derived entry, why it lacks which of the `ABILITIES`.
    """

    name: str
    layers: str
    attention: Attention
    up: tuple[str, ...] = ()
    down: str = ""
    gated_up: tuple[str, ...] = ()
    gated_down: str | None = None
    more_ffns: tuple[FFN, ...] = ()
    experts: Experts | None = None
    cross_attention: Attention | None = None
    cross_if: str | None = None
    config: str | None = None
    num_layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"
    neurons: str | None = "intermediate_size"
    count_neurons: Callable[[PreTrainedConfig], int] | None = None
    kv_heads: str | None = None
    one_kv_head: bool = False
    head_dim: str | None = None
    head_size: int | None = None
    attending: tuple[int, ...] | None = None
    gaps: int | None = None
    places: tuple[int, ...] | None = None
    num_neurons: int | None = None
    causal: bool | None = None
    sees_patches: bool = False
    refusals: tuple[tuple[str, str], ...] = ()

    def why_not(self, ability: str) -> str | None:
        """Why this stack lacks an ability; None: it has it."""
        why = dict(self.refusals).get(ability)
        return why or ("no mixture of experts is known in it" if ability == EXPERTS and not self.experts else None)

    def without(self, ability: str, why: str) -> Stack:
        """The same stack, but that it does not say what the ability needs."""
        refused = replace(self, refusals=tuple(sorted({**dict(self.refusals), ability: why}.items())))
        if ability == HEADS:
            cross = self.cross_attention and self.cross_attention.without_heads()
            return replace(refused, attention=self.attention.without_heads(), cross_attention=cross)
        if ability == EXPERTS:
            return replace(refused, experts=None)
        return replace(refused, up=(), down="", more_ffns=()) if ability == NEURONS else refused

    def with_layers(self, kept: Sequence[int]) -> Stack:
        """The same for a stack of which these layers are left, in this order."""
        attending, places = self.attending, self.places
        if attending is not None:
            attending = tuple(new for new, old in enumerate(kept) if old in attending)
        if self.gaps is not None:
            places = tuple(layer if places is None else places[layer] for layer in kept)
        return replace(self, attending=attending, places=places)

    def own_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The config that holds the sizes of this stack."""
        return attrgetter(self.config)(config) if self.config else config


@dataclass(frozen=True)
class Family:
    """One architecture, as transformers builds it.

    Fields:
        config_name: its config class in transformers.
        stacks: its towers, in the order in which data flows.
        norm: how its blocks meet the residual stream: `"post"`, norm(x + block(x)), or `"pre"`, x + block(norm(x)).
            `None` where what a block gives is scaled or normed before it is added.
        heads_divide_hidden: the stock config insists that the head count divides the hidden size.
        gated: the config field that says that the FFN is gated, where it may be either (T5).
        per_layer: config fields that are lists with one entry for each layer.
        of_depth: config fields that the stock config makes itself, and anew for another depth.
        first_stays: the first layer is built unlike the others, so that none of them can take its place.
        positions: the tables of absolute positions, relative to the base model, with `max_positions` the config field
            that says how long a text may be; empty where positions are rotary, relative or tied to an image size.
        position_offset: rows of the tables that stand before the first position and are not counted (BART).
        positions_after_pad: positions start behind that of the padding token, and its row is counted (RoBERTa).
        sinusoidal: the tables are a formula, not learned.
        relative_bias: the embedding in the first layer that holds a relative position bias shared by all layers
            of the stack. It ties the heads of all layers: they can only be pruned together.
        encoder_sizes_cache: `generate` makes as many cache layers as the *encoder* has (seen in 5.23: a stock T5 with
            a decoder deeper than its encoder raises IndexError), so the decoder must not become the deeper one.
        left_out: of a derived entry, lists of layers that it does not describe, which stay as they are.
    """

    model_type: str
    config_name: str
    stacks: tuple[Stack, ...] = ()
    norm: str | None = None
    heads_divide_hidden: bool = False
    gated: str | None = None
    per_layer: tuple[str, ...] = ()
    of_depth: tuple[str, ...] = ()
    first_stays: bool = False
    positions: tuple[str, ...] = ()
    max_positions: str | None = None
    position_offset: int = 0
    positions_after_pad: bool = False
    sinusoidal: bool = False
    relative_bias: str | None = None
    encoder_sizes_cache: bool = False
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For config.json: what differs from the defaults. Only derived entries are written, which hold no code."""
        return _to_dict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Family:
        """
        Raises:
            ConfigError: anything that no derived entry says.
        """
        family = _from_dict(cls, data, "family")
        if not family.stacks:
            raise ConfigError("efficient.family has no stacks.")
        return family

    def without(self, ability: str, why: str, stack: str) -> Family:
        """The same entry, but that it does not say of one stack what the ability needs."""
        return replace(
            self, stacks=tuple(one.without(ability, why) if one.name == stack else one for one in self.stacks)
        )

    def why_not(self, ability: str) -> str | None:
        """Why models of this family lack an ability in all their stacks; None: one at least has it."""
        reasons = {stack.name: stack.why_not(ability) for stack in self.stacks}
        if not all(reasons.values()):
            return None
        return "; ".join(f"{name}: {why}" for name, why in reasons.items())

    @property
    def deepest(self) -> str | None:
        """The stack that no other may outgrow, if there is one."""
        return self.stacks[0].name if self.encoder_sizes_cache else None

    def first_position(self, config: PreTrainedConfig) -> int:
        """The row of a position table that belongs to the first token of a text."""
        return (getattr(config, "pad_token_id", None) or 0) + 1 if self.positions_after_pad else self.position_offset


def _to_dict(entry: Any) -> dict[str, Any]:
    written = {}
    for one in fields(entry):
        value = getattr(entry, one.name)
        if value != one.default:
            parts = [_to_dict(part) for part in value] if one.name in ("stacks", "more_ffns") else value
            written[one.name] = _to_dict(value) if isinstance(value, Attention | Experts) else parts
    return written


def _from_dict(kind: type, data: Any, where: str) -> Any:
    """An entry of a config.json, which may come from a stranger: names and small numbers alone."""
    known = {one.name: one for one in fields(kind) if one.name != "count_neurons"}
    if not isinstance(data, dict) or any(name not in known for name in data):
        raise ConfigError(f"efficient.{where} must be a mapping with some of {', '.join(known)}; got {shown(data)}.")
    values: dict[str, Any] = {}
    for name, value in data.items():
        place = f"{where}.{name}"
        if name in ("stacks", "more_ffns"):
            if not isinstance(value, list | tuple) or len(value) > MAX_STACKS:
                raise ConfigError(f"efficient.{place} must be a list of at most {MAX_STACKS} mappings.")
            part = Stack if name == "stacks" else FFN
            values[name] = tuple(_from_dict(part, one, f"{place}[{i}]") for i, one in enumerate(value))
        elif name in ("attention", "cross_attention", "experts"):
            kept = Experts if name == "experts" else Attention
            values[name] = None if value is None else _from_dict(kept, value, place)
        elif name == "refusals":
            values[name] = tuple((str(ability), str(why)[:MAX_TEXT]) for ability, why in _pairs(value, place))
        else:
            values[name] = _plain(value, known[name].type, place)
    if kind is FFN and (values.get("kind") not in NEURON_KINDS or values.get("down_dim", 0) > 2):
        raise ConfigError(f"efficient.{where}: an FFN is one of {', '.join(NEURON_KINDS)}, in dimension 1 or 2.")
    if kind is Attention:
        _check_dims(values, where)
    if kind is Experts:
        rows, dims = values.get("rows", ()), values.get("row_dims", ())
        own = values.get("listed") or any(row.startswith(f"{values.get('module')}.") for row in rows)
        if len(rows) != len(dims) or any(dim > 2 for dim in dims) or not own:
            raise ConfigError(f"efficient.{where}: each of `rows`, some of `module`, has a dimension from 0 to 2.")
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"efficient.{where} is not complete: {error}") from error


def _check_dims(values: dict[str, Any], where: str) -> None:
    per_head, shared = values.get("per_head_dims", ()), values.get("shared_dims", ())
    lengths = len(values.get("per_head", ())), len(values.get("shared", ()))
    if len(per_head) not in (0, lengths[0]) or len(shared) != lengths[1] or any(dim > 3 for dim in per_head + shared):
        raise ConfigError(f"efficient.{where}: each part of a head has a dimension from 0 to 3.")


def _pairs(value: Any, where: str) -> list[tuple]:
    if not isinstance(value, list | tuple) or any(not isinstance(one, list | tuple) or len(one) != 2 for one in value):
        raise ConfigError(f"efficient.{where} must be a list of pairs.")
    return [tuple(one) for one in value[: len(ABILITIES) + 1]]


def _plain(value: Any, kind: str, where: str) -> Any:
    """A path of names, a switch, a small number, or a few names: what the field is declared as."""
    kinds = kind.split(" | ")
    is_name = isinstance(value, str) and len(value) <= MAX_TEXT and re.fullmatch(r"[\w.\-]*", value)
    if value is None and "None" in kinds:
        return None
    if isinstance(value, bool) and "bool" in kinds:
        return value
    if is_name and "__" not in value and "str" in kinds:
        return value
    if type(value) is int and 0 <= value <= MAX_NUMBER and "int" in kinds:
        return value
    if isinstance(value, list | tuple) and len(value) <= MAX_NAMES and "tuple[str, ...]" in kinds:
        return tuple(_plain(one, "str", where) for one in value)
    allowed = {"str": "a path of names", "bool": "a switch", "int": f"a number up to {MAX_NUMBER}", "None": "null"}
    if isinstance(value, list | tuple) and len(value) <= MAX_LAYERS and "tuple[int, ...]" in kinds:
        return tuple(_plain(one, "int", where) for one in value)
    names = " or ".join(allowed.get(one, "a few names") for one in kinds)
    raise ConfigError(f"efficient.{where} must be {names}, got {shown(value)}.")
