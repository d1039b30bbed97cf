"""The stacks of one model: what the table of families says about them, put together with a config and with modules.

for stack in model_stacks(model, family):
    print(stack.name, stack.num_heads, stack.layers[0])
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ConfigError
from .family import FFN, Attention, Family, Stack
from .linears import holds
from .mixtures import Mixture, mixture_of


def said(config: PreTrainedConfig, field: str) -> Any:
    """What a config says in a field; `depths.1` is the second entry of a list.

    Raises:
        ConfigError: it says nothing there.
    """
    name, _, index = field.partition(".")
    try:
        value = getattr(config, name)
        return value[int(index)] if index else value
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(f"A {type(config).__name__} has no {field!r}.") from error


def _entered(changes: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The changes, those of an entry of a list as changes of the list."""
    new: dict[str, Any] = {}
    for field, value in changes.items():
        name, _, index = field.partition(".")
        whole = list(new.get(name, fields.get(name))) if index else value
        if index:
            whole[int(index)] = value
        new[name] = whole
    return new


@dataclass(frozen=True, eq=False)
class ConfigStack:
    """One stack of a family with the sizes of one config: the stock sizes, from which layers may have been pruned."""

    family: Family
    entry: Stack
    config: PreTrainedConfig

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def sizes(self) -> PreTrainedConfig:
        """The config that holds the sizes of this stack."""
        return self.entry.own_config(self.config)

    def changed(self, fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        """The changes of a config so far, and these of the sizes of this stack."""
        if not self.entry.config:
            return fields | _entered(changes, vars(self.config) | fields)
        first, *rest = self.entry.config.split(".")
        whole = fields.get(first) or getattr(self.config, first).to_dict()
        part = whole
        for name in rest:
            part = part[name]
        part.update(_entered(changes, part))
        return fields | {first: whole}

    @property
    def depth(self) -> int:
        """The number of layers, without the gaps that others have left."""
        return said(self.sizes, self.entry.num_layers) if self.entry.places is None else len(self.entry.places)

    def place(self, layer: int) -> int:
        """Where a layer stands in the stock model."""
        return layer if self.entry.places is None else self.entry.places[layer]

    @property
    def width(self) -> int:
        """The hidden size."""
        return said(self.sizes, self.entry.hidden)

    @property
    def num_neurons(self) -> int:
        if self.entry.count_neurons:
            return self.entry.count_neurons(self.sizes)
        if self.entry.num_neurons:
            return self.entry.num_neurons
        assert self.entry.neurons, f"{self.name}: neither `neurons` nor `count_neurons`"
        return getattr(self.sizes, self.entry.neurons)

    @property
    def num_heads(self) -> int:
        """One where nothing is known of any."""
        return said(self.sizes, self.entry.heads) if self.entry.heads else 1

    @property
    def num_kv_heads(self) -> int:
        if self.entry.one_kv_head:
            return 1
        return said(self.sizes, self.entry.kv_heads) if self.entry.kv_heads else self.num_heads

    @property
    def group_size(self) -> int:
        """Query heads that leave together: those of one key/value head; 1 where all share one, or each has its own."""
        return 1 if self.entry.one_kv_head else self.num_heads // self.num_kv_heads

    @property
    def head_width(self) -> int:
        """The dimension of one head."""
        field = self.entry.head_dim
        width = field and getattr(self.sizes, field, None)
        return width or self.entry.head_size or self.width // self.num_heads

    @property
    def attending(self) -> tuple[int, ...]:
        """The layers that have self-attention: all but in hybrids."""
        return tuple(range(self.depth)) if self.entry.attending is None else self.entry.attending

    @property
    def is_causal(self) -> bool:
        """Its self-attention sees no later tokens: decoders, the text of CLIP, and encoders used as decoders."""
        if self.entry.causal is not None:
            return self.entry.causal
        return self.name in ("decoder", "text") or getattr(self.config, "is_decoder", False)

    @property
    def cross(self) -> Attention | None:
        """The cross attention that its layers have, if any."""
        needs = self.entry.cross_if
        return self.entry.cross_attention if needs is None or getattr(self.config, needs) else None

    @property
    def attentions(self) -> dict[str, Attention]:
        """The attention modules under the names that sizes and plans use: `heads`, and `cross_heads` if any."""
        return {"heads": self.entry.attention} | ({"cross_heads": self.cross} if self.cross else {})

    @property
    def up(self) -> tuple[str, ...]:
        """The linears that widen: one, or two (gate and up, perhaps the same fused one) in a gated FFN."""
        return self.entry.gated_up if self._is_gated else self.entry.up

    @property
    def down(self) -> str:
        """The linear that narrows again."""
        return self.entry.gated_down if self.entry.gated_down and self._is_gated else self.entry.down

    @property
    def ffns(self) -> dict[str, FFN]:
        """The FFNs under the names that sizes and plans use: `neurons`, and others beside it; {} where none is known.
        A layer need not have all of them."""
        entry = self.entry
        first = FFN("neurons", self.up, self.down, entry.neurons, entry.num_neurons)
        return {ffn.kind: ffn for ffn in (*((first,) if self.down else ()), *entry.more_ffns)}

    def width_of(self, kind: str) -> int:
        """The neurons of one of its FFNs; of experts those of each."""
        ffn = self.ffns[kind]
        if kind == "neurons":
            return self.num_neurons
        return ffn.num_neurons if ffn.neurons is None else getattr(self.sizes, ffn.neurons)

    @property
    def _is_gated(self) -> bool:
        return self.family.gated is not None and bool(getattr(self.config, self.family.gated))

    def per_layer(self, kept: Sequence[int]) -> dict[str, list]:
        """Config fields with one entry for each layer, for the layers that stay; none where they keep their places."""
        if self.entry.gaps is not None:
            return {}
        fields = {name: getattr(self.sizes, name, None) for name in self.family.per_layer}
        lists = {n: values for n, values in fields.items() if isinstance(values, list | tuple)}
        # a stack beside this one may have a list of the same name, of another length
        return {n: [values[layer] for layer in kept] for n, values in lists.items() if len(values) == self.depth}

    def has_window(self, layer: int) -> bool:
        """The stock config gives the layer a sliding window of its own."""
        types = getattr(self.sizes, "layer_types", None)
        if isinstance(types, list | tuple) and len(types) == said(self.sizes, self.entry.num_layers):
            return types[self.place(layer)] == "sliding_attention"
        return getattr(self.sizes, "sliding_window", None) is not None


@dataclass(frozen=True, eq=False)
class ModelStack(ConfigStack):
    """One stack that a model really has: its layers, and the name that state-dict keys have for them.

    `prefix` is that of the ModuleList: `bert.encoder.layer`; `layers` are those of it that are no gaps.
    """

    layers: nn.ModuleList
    prefix: str

    def ffns_in(self, index: int) -> dict[str, FFN]:
        """The FFNs that one layer has."""
        return {kind: ffn for kind, ffn in self.ffns.items() if holds(self.layers[index], ffn.down)}

    def attentions_in(self, index: int) -> dict[str, Attention]:
        """The attention modules that one layer has: among state-space layers few have any."""
        held = {kind: one for kind, one in self.attentions.items() if holds(self.layers[index], one.module)}
        return {kind: one for kind, one in held.items() if kind != "heads" or index in self.attending}

    def layer_prefix(self, index: int) -> str:
        """`bert.encoder.layer.3`."""
        return f"{self.prefix}.{self.place(index)}"


def config_stacks(config: PreTrainedConfig, family: Family) -> tuple[ConfigStack, ...]:
    return tuple(ConfigStack(family, entry, config) for entry in family.stacks)


def model_stacks(model: PreTrainedModel, family: Family) -> Iterator[ModelStack]:
    """The stacks that this model really has: `T5EncoderModel` has no decoder."""
    names = {module: name for name, module in model.named_modules()}
    modules = dict(model.base_model.named_modules())
    for entry in family.stacks:
        # CLIPTextModelWithProjection did not say which of its modules is the base model before transformers 5.23.
        inside = (name for name in modules if name.endswith(f".{entry.layers}"))
        path = entry.layers if entry.layers in modules else next(inside, None)
        if path is not None:
            layers = modules[path]
            if entry.places is not None:
                layers = nn.ModuleList(layers[place] for place in entry.places)
            yield ModelStack(family, entry, model.config, layers, names[modules[path]])


def mixtures_of(stack: ModelStack) -> list[Mixture]:
    """The mixtures of experts of one stack, of the layers that have one."""
    entry = stack.entry.experts
    if entry is None:
        return []
    field = f"{stack.entry.config or ''}.{entry.count}"
    return [
        mixture_of(layer, entry, stack.sizes, stack.name, index, stack.layer_prefix(index), field)
        for index, layer in enumerate(stack.layers)
        if holds(layer, entry.module)
    ]
