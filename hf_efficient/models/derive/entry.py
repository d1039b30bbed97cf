"""From what was found in a tiny model to a `Family`: its stacks, where they keep what, and the config fields.

family = make_entry(tiny_model(tiny_config(config)), inputs)
family.refusals                                           # {"neurons": "encoder: a mixture of experts"}
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...errors import UnsupportedModelError
from ..family import CONVERT, FFN, HEADS, LAYERS, NEURONS, Attention, Family, Stack
from .ffns import find_ffns
from .observe import Call, LayerRun, observing, run
from .positions import positions_of
from .roles import PARTLY, QUERY, Heads, NotDerivable, attention_call, attention_roles, maker, norm_place
from .unseen import unseen_attention

# The standard name of each size, then other names that models have for it.
FIELDS = {
    "heads": "num_attention_heads num_heads n_head n_heads attention_heads encoder_attention_heads "
    "decoder_attention_heads",
    "kv_heads": "num_key_value_heads num_kv_heads n_head_kv kv_heads",
    "layers": "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers depth layers inner_group_num",
    "hidden": "hidden_size d_model dim n_embd embed_dim hidden_dim encoder_hidden_size decoder_hidden_size",
    "neurons": "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim hidden_dim n_inner ffn_hidden_size "
    "mlp_dim inner_dim dim_feedforward encoder_intermediate_size",
    "expert_neurons": "moe_intermediate_size expert_ffn_hidden_size intermediate_size ffn_dim d_ff expert_dim",
    "shared_neurons": "shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp",
    "experts_per_token": "num_experts_per_tok num_experts_per_token top_k_experts moe_topk moe_k top_k",
    "head_dim": "head_dim d_kv attention_head_dim kv_channels",
}
OF_DEPTH = ("stage_names", "out_features", "out_indices")  # of backbones, which make them anew for another depth
NAMES = (("vision", "visio|visual|image|pixel"), ("audio", "audio|speech|acoustic"), ("text", "text|language"))


@dataclass
class Place:
    """A list of layers and the attention modules in it: self-attention and cross attention, each path with the layers
    that have it."""

    own: dict[str, list[int]] = field(default_factory=dict)
    cross: dict[str, list[int]] = field(default_factory=dict)
    is_causal: bool = False
    is_biased: bool = False
    logits: bool = False


def make_entry(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Family:
    """
    Raises:
        NotDerivable: nothing of the model can be described.
    """
    with observing(model) as calls:
        run(model, inputs)
    base = model.base_model
    places: dict[str, Place | None] = dict(_places(base, calls))
    places |= dict.fromkeys(_unseen_places(base, [path for path in places if path]))
    if not places:
        raise NotDerivable("it has no list of layers with attention")
    stacks, norms, refusals, relative_bias = [], set(), {}, None
    names = _stack_names(places)
    for path, place in places.items():
        try:
            if not path:
                raise NotDerivable("attention outside of a list of layers")
            stack, norm = _make_stack(model, path, names[path], place, inputs)
        except UnsupportedModelError as reason:
            refusals[path] = f"{names[path]}: {reason}"
            continue
        if place is not None and place.is_biased:
            try:
                relative_bias = _shared_table(base.get_submodule(path), stack.attention.module)
            except NotDerivable as reason:
                for ability in (CONVERT, HEADS, LAYERS):
                    stack = stack.without(ability, str(reason))
        stacks.append(stack)
        norms.add(norm)
    if not stacks:
        raise NotDerivable("; ".join(refusals.values()))
    config = model.config
    return Family(
        model_type=config.model_type,
        config_name=type(config).__name__,
        stacks=tuple(stacks),
        norm=norms.pop() if len(norms) == 1 else None,
        per_layer=_per_layer(stacks, config),
        of_depth=tuple(name for name in OF_DEPTH if hasattr(config, name)),
        relative_bias=relative_bias,
        left_out=tuple(path for path in refusals if path),
        **positions_of(model, inputs),
    )


def _places(base: nn.Module, calls: list[Call]) -> dict[str, Place]:
    """Lists of layers, by their paths in the base model, in the order in which data flows."""
    modules = dict(base.named_modules())
    names = {module: name for name, module in modules.items()}
    places: dict[str, Place] = {}
    for call in calls:
        path, index, inside = _layer_of(modules, names[call.module])
        place = places.setdefault(path, Place())
        layers = (place.cross if call.is_cross else place.own).setdefault(inside, [])
        if index not in layers:
            layers.append(index)
        place.is_causal |= call.is_causal and not call.is_cross
        place.logits |= call.has_logits
        place.is_biased |= call.has_bias and not call.is_cross
    return places


def _layer_of(modules: Mapping[str, nn.Module], name: str) -> tuple[str, int, str]:
    """The list of layers that holds a module, its number there, and its path in the layer: the innermost list of
    modules that are alike."""
    parts, candidates = name.split("."), []
    for end in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:end])
        if parts[end].isdigit() and isinstance(modules.get(path), nn.ModuleList | nn.Sequential):
            kinds = Counter(type(one).__name__ for one in modules[path])
            candidates.append((len(kinds) == 1, path, int(parts[end]), ".".join(parts[end + 1 :])))
    if not candidates:
        return "", 0, name
    alike = [one for one in candidates if one[0]]
    return (alike[0] if alike else candidates[-1])[1:]


def _unseen_places(base: nn.Module, seen: list[str]) -> list[str]:
    """Lists of modules that are alike, outside of those in which attention was seen: what has tokens meet in it is
    found later. Lists inside lists are parts of layers."""
    paths: list[str] = []
    for path, module in base.named_modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(one) for one in module}) == 1
        inside = [f"{other}." for other in (*seen, *paths)]
        holds = any(f"{other}.".startswith(f"{path}.") for other in seen)
        if is_list and not holds and not any(f"{path}.".startswith(other) for other in inside):
            paths.append(path)
    return [path for path in paths if _has_linears(base.get_submodule(path))]


def _has_linears(layers: nn.Module) -> bool:
    return sum(isinstance(module, nn.Linear | Conv1D) for module in layers[0].modules()) >= 2


def _stack_names(places: Mapping[str, Place | None]) -> dict[str, str]:
    """`encoder`, `decoder`, `text`, `vision`, `audio`; the path where two would have the same."""
    if len(places) == 1:
        return {path: "decoder" if place and place.is_causal else "encoder" for path, place in places.items()}
    names = {}
    for path, place in places.items():
        known = next((name for name, words in NAMES if re.search(words, path)), None)
        side = re.search("encoder|decoder", path)
        names[path] = known or (side[0] if side else "decoder" if place and place.is_causal else "encoder")
    often = Counter(names.values())
    return {path: name if often[name] == 1 else path.replace(".", "_") or "model" for path, name in names.items()}


@dataclass
class Found:
    """The attention of the first layer of a stack."""

    attention: Attention
    sizes: Heads
    is_causal: bool
    cross: Attention | None = None
    attending: tuple[int, ...] | None = None
    why: dict[str, str] = field(default_factory=dict)


def _seen_attention(layer: LayerRun, place: Place, layers: nn.ModuleList) -> Found:
    if not place.own:
        raise NotDerivable("its layers have cross attention alone")
    if len(place.own) > 1 or len(place.cross) > 1:
        raise NotDerivable("several attentions of the same sort in one layer")
    [(inside, indices)] = place.own.items()
    call = attention_call(layer.base, layer.layer.get_submodule(inside))
    found = Found(Attention(inside), Heads.of(call), place.is_causal)
    if len(indices) < len(layers):
        found.attending, found.why[HEADS] = tuple(sorted(indices)), PARTLY
    try:
        found.attention = attention_roles(layer, inside)
    except NotDerivable as reason:
        found.why.setdefault(HEADS, str(reason))
    for path in place.cross:
        try:
            found.cross = attention_roles(layer, path)
        except NotDerivable as reason:
            found.cross = Attention(path)
            found.why.setdefault(HEADS, f"cross attention: {reason}")
        found.cross = replace(found.cross, logits=place.logits)
    found.attention = replace(
        found.attention,
        class_name=type(call.module).__name__,
        logits=place.logits,
        uneven=found.sizes.dim != found.sizes.value_dim,
    )
    return found


def _make_stack(
    model: PreTrainedModel, path: str, name: str, place: Place | None, inputs: Mapping[str, Tensor]
) -> tuple[Stack, str | None]:
    """The entry of one stack, and the place of its norms."""
    layers = model.base_model.get_submodule(path)
    start = min((indices[0] for indices in place.own.values()), default=0) if place else 0
    first = LayerRun(model, layers[start], inputs)
    if place is None:
        found = Found(*unseen_attention(first), why={CONVERT: "it computes its attention itself"})
        name = (
            "decoder" if found.is_causal and name == "encoder" and "encoder" not in path else name
        )  # now it is known
    else:
        found = _seen_attention(first, place, layers)
    why = found.why
    ffns: dict[str, FFN] = {}
    try:
        runs = [first if layer is first.layer else LayerRun(model, layer, inputs) for layer in layers]
        ffns = {ffn.kind: ffn for ffn in find_ffns(runs, found.attention)}
    except NotDerivable as reason:
        why[NEURONS] = str(reason)
    main = ffns.pop("neurons", FFN("neurons", (), ""))
    readers = [found.attention.output, *([found.cross.output] if found.cross else []), main.down]
    norm = norm_place(first, readers) if all(readers) else None
    own, where = _own_config(model, first.layer.get_submodule(found.attention.module), found.sizes, len(layers))
    fields = _fields(own, path, found, len(layers), first, main)
    if fields["head_dim"] is None and getattr(own, fields["hidden"]) != found.sizes.dim * found.sizes.heads:
        why.setdefault(HEADS, "no config field says how wide a head is")
        fields["head_size"], found.attention = found.sizes.dim, _measurable(first, found)
    stack = Stack(
        name=name,
        layers=path,
        attention=found.attention,
        cross_attention=found.cross,
        up=main.up,
        down=main.down,
        more_ffns=tuple(width_said(ffn, own) for ffn in ffns.values()),
        config=where or None,
        causal=found.is_causal,
        attending=found.attending,
        sees_patches=name == "vision",
        **fields,
    )
    for ability, reason in why.items():
        stack = stack.without(ability, reason)
    return stack, norm


def _measurable(layer: LayerRun, found: Found) -> Attention:
    """The attention with the linear by which the width of a head can be measured in any model of the sort."""
    queries = maker(layer, layer.layer.get_submodule(found.attention.module), QUERY)
    if layer.base.outputs[queries].shape[-1] != found.sizes.heads * found.sizes.dim:
        raise NotDerivable("neither a config field nor a linear says how wide a head is")
    return replace(found.attention, measure=queries)


def _own_config(
    model: PreTrainedModel, attention: nn.Module, sizes: Heads, depth: int
) -> tuple[PreTrainedConfig, str]:
    """The config with the sizes of a stack, and its path in that of the model: the one that the attention reads, or
    the first that says these numbers of heads and layers."""
    configs = dict(_nested(model.config))
    own = getattr(attention, "config", None)
    for path, config in configs.items():
        if config is own:
            return config, path
    for path, config in configs.items():
        if find_field(config, "heads", sizes.heads) and find_field(config, "layers", depth):
            return config, path
    raise NotDerivable("no config says how many heads and layers it has")


def _nested(config: PreTrainedConfig, path: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig) and not name.startswith("_"):
            yield from _nested(value, f"{path}.{name}" if path else name)


def find_field(config: PreTrainedConfig, role: str, size: int | None, *first: str, mapped: bool = True) -> str | None:
    """The field of a config that holds a size, under one of the names for its role."""
    for name in (*first, *FIELDS[role].split()):
        real = config.attribute_map.get(name, name)
        value = vars(config).get(real)
        if size is not None and type(value) is int and value == size and (mapped or real == name):
            return real
    return None


def _fields(own: PreTrainedConfig, path: str, found: Found, depth: int, layer: LayerRun, ffn: FFN) -> dict[str, Any]:
    """The names of the config fields of a stack.

    Raises:
        NotDerivable: no field says how many layers or heads it has, or how wide it is.
    """
    sizes, attention = found.sizes, found.attention
    side = next((part for part in path.split(".") if part in ("encoder", "decoder")), "")
    wide = layer.base.outputs[attention.output].shape[-1] if attention.output else None
    fields: dict[str, Any] = {
        "heads": find_field(own, "heads", sizes.heads, f"{side}_attention_heads"),
        "num_layers": find_field(own, "layers", depth, f"{side}_layers", f"num_{side}_layers"),
        "hidden": find_field(own, "hidden", wide if wide is not None else _any_hidden(own)),
        "neurons": width_said(ffn, own, f"{side}_ffn_dim").neurons,
        "kv_heads": find_field(
            own, "kv_heads", sizes.kv_heads, mapped=False
        ),  # Whisper calls other heads by this name
    }
    head_dim = find_field(own, "head_dim", sizes.dim)
    fields["head_dim"] = head_dim if head_dim in getattr(type(own), "__dataclass_fields__", {}) else None
    if fields["num_layers"] is None:
        raise NotDerivable(f"no config field says that it has {depth} layers")
    if fields["heads"] is None or fields["hidden"] is None:
        raise NotDerivable("no config field says how many heads it has, or how wide it is")
    if fields["kv_heads"] is None and sizes.kv_heads != sizes.heads:
        raise NotDerivable("no config field says how many key/value heads it has")
    if fields["neurons"] is None:
        fields["num_neurons"] = ffn.num_neurons  # for this one config
    return fields


def width_said(ffn: FFN, config: PreTrainedConfig, *first: str) -> FFN:
    """An FFN with the field that says its width instead of the width, and for experts how many work for a token."""
    role = "neurons" if ffn.down_dim == 0 else "expert_neurons"
    first += tuple(FIELDS["shared_neurons"].split()) if "shared" in ffn.down or ffn.kind == "neurons_2" else ()
    name = find_field(config, role, ffn.num_neurons, *first)
    active = FIELDS["experts_per_token"].split() if ffn.has_experts else []
    active = [one for one in active if type(vars(config).get(config.attribute_map.get(one, one))) is int]
    ffn = replace(ffn, active=config.attribute_map.get(active[0], active[0]) if active else None)
    return replace(ffn, neurons=name, num_neurons=None) if name else ffn


def _any_hidden(config: PreTrainedConfig) -> int | None:
    names = (config.attribute_map.get(name, name) for name in FIELDS["hidden"].split())
    return next((value for name in names if type(value := vars(config).get(name)) is int), None)


def _shared_table(layers: nn.ModuleList, attention: str) -> str:
    """The path in a layer of the relative position bias of the first, which all layers share."""
    tables = [
        {name for name, module in layer.get_submodule(attention).named_modules() if isinstance(module, nn.Embedding)}
        for layer in layers
    ]
    if len(tables[0]) != 1 or any(tables[1:]):
        raise NotDerivable("a position bias that is not one table in the first layer")
    return f"{attention}.{tables[0].pop()}"


def _per_layer(stacks: list[Stack], config: PreTrainedConfig) -> tuple[str, ...]:
    """Fields of the configs that are lists with one entry for each layer of their stack."""
    names = set()
    for stack in stacks:
        own = stack.own_config(config)
        depth = getattr(own, stack.num_layers)
        known = getattr(type(own), "__dataclass_fields__", {})
        names |= {
            name
            for name, value in vars(own).items()
            if isinstance(value, list | tuple)
            and len(value) == depth
            and name in known
            and re.search("layer|type|pattern", name)
        }
    return tuple(sorted(names))
