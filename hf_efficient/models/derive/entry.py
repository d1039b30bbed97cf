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

from ..family import CONVERT, EXPERTS, FFN, HEADS, LAYERS, NEURONS, Attention, Family, Stack
from ..stacks import said
from .biases import read_tables, with_bias
from .depths import depth_field, is_depth_field
from .experts import find_experts
from .ffns import find_ffns
from .fields import FIELDS, any_hidden, find_field, lists_of, nested_configs, of_stage, width_said
from .head_parts import with_shared
from .observe import Call, LayerRun, observing, read_bools, run
from .positions import positions_of
from .roles import QUERY, Heads, NotDerivable, attention_call, attention_roles, maker, norm_place, said_of
from .unseen import attends, own_attention

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
    read_bools(model, inputs)
    with read_tables(model) as tables, observing(model) as calls:
        run(model, inputs)
    base = model.base_model
    places: dict[str, Place | None] = dict(_places(base, calls))
    configs = [config for _, config in nested_configs(model.config)]
    depths = {len(said(config, name)) for config in configs for name in lists_of(config, "layers")}
    places |= dict.fromkeys(_unseen_places(base, [path for path in places if path], depths))
    if not places:
        raise NotDerivable("it has no list of layers with attention")
    stacks, others, norms, refusals, relative_bias = [], [], set(), {}, None
    names = _stack_names(places)
    for path, place in places.items():
        try:
            if not path:
                raise NotDerivable("attention outside of a list of layers")
            stack, norm = _make_stack(model, path, names[path], place, inputs)
        except Exception as error:  # whatever the code of a model may raise
            if place is not None or attends(model, base.get_submodule(path), inputs):
                refusals[path] = f"{names[path]}: {said_of(error)}"
            continue
        if place is not None and place.is_biased:
            stack, table = with_bias(stack, base.get_submodule(path), tables)
            relative_bias = table or relative_bias
        has_attention = stack.heads or attends(model, base.get_submodule(path), inputs)
        (stacks if has_attention else others).append(stack)
        norms.add(norm)
    stacks = stacks or others  # beside layers with attention, lists without any are no towers
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


def _unseen_places(base: nn.Module, seen: list[str], depths: set[int]) -> list[str]:
    """Lists of modules that are alike, outside of those in which attention was seen: what has tokens meet in it is
    found later. Lists inside lists are parts of layers, but where a config says how deep each stage is."""
    paths: list[str] = []
    for path, module in base.named_modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(one) for one in module}) == 1
        inside = [f"{other}." for other in (*seen, *paths)]
        holds = any(f"{other}.".startswith(f"{path}.") for other in seen)
        is_of_stages = is_list and len(module) in depths and _has_lists(module)
        if is_list and not holds and not is_of_stages and not any(f"{path}.".startswith(one) for one in inside):
            paths.append(path)
    return [path for path in paths if _has_linears(base.get_submodule(path))]


def _has_lists(stages: nn.ModuleList) -> bool:
    return all(any(isinstance(one, nn.ModuleList | nn.Sequential) for one in stage.modules()) for stage in stages)


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
    """The attention of the first layer of a stack; without sizes one of which nothing is known."""

    attention: Attention
    sizes: Heads | None
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
        found.attending = tuple(sorted(indices))
    try:
        found.attention = attention_roles(layer, inside)
    except NotDerivable as reason:
        found.why.setdefault(HEADS, str(reason))
    for path, crossed in place.cross.items():
        if len(crossed) < len(layers) and not {*crossed} & {*indices}:  # layers of their own, which stay as they are
            found.cross = Attention(path)
        if len(crossed) < len(layers):
            found.why.setdefault(HEADS, "cross attention in some of its layers alone")
            continue
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


def _attention(layer: LayerRun, place: Place | None, layers: nn.ModuleList) -> Found:
    """What is known of the attention of a layer, which may be nothing: it then has FFNs, and may leave."""
    try:
        if place is not None:
            return _seen_attention(layer, place, layers)
        attention, sizes, is_causal, why = own_attention(layer)
        return Found(attention, sizes, is_causal, why=why)
    except Exception as error:  # whatever the code of a model may raise
        is_causal = place.is_causal if place else False
        return Found(Attention(""), None, is_causal, why=dict.fromkeys((CONVERT, HEADS), said_of(error)))


def _make_stack(
    model: PreTrainedModel, path: str, name: str, place: Place | None, inputs: Mapping[str, Tensor]
) -> tuple[Stack, str | None]:
    """The entry of one stack, and the place of its norms."""
    layers = model.base_model.get_submodule(path)
    start = min((indices[0] for indices in place.own.values()), default=0) if place else 0
    first = LayerRun(model, layers[start], inputs)
    found = _attention(first, place, layers)
    if place is None and found.is_causal and name == "encoder" and "encoder" not in path:
        name = "decoder"  # now it is known
    if found.attention.query and found.sizes:
        found.attention = with_shared(first, found.attention, found.sizes.heads)
    why = found.why
    ffns: dict[str, FFN] = {}
    try:
        unlike = {_shapes(layer): layer for layer in (*reversed(layers), first.layer)}.values()
        runs = [
            first if layer is first.layer else LayerRun(model, layer, inputs) for layer in layers if layer in unlike
        ]
        ffns = {ffn.kind: ffn for ffn in find_ffns(runs, found.attention)}
    except NotDerivable as reason:
        why[NEURONS] = str(reason)
    main = ffns.pop("neurons", FFN("neurons", (), ""))
    readers = [found.attention.output, *([found.cross.output] if found.cross else []), main.down]
    norm = norm_place(first, readers) if first.base.outputs.keys() >= set(readers) else None
    own, where, num_layers = _own_config(model, first.layer, found, len(layers), path)
    fields = {"num_layers": num_layers} | _fields(own, path, found, first, main)
    try:
        fields["experts"] = find_experts(layers, said(own, fields["hidden"]), own)
    except NotDerivable as reason:
        why[EXPERTS] = str(reason)
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


def _shapes(layer: nn.Module) -> tuple:
    """What layers that are built alike have in common."""
    return (type(layer), *((name, *parameter.shape) for name, parameter in layer.named_parameters()))


def _measurable(layer: LayerRun, found: Found) -> Attention:
    """The attention with the linear by which the width of a head can be measured in any model of the sort."""
    own = found.attention
    queries = own.query if own.routed else maker(layer, layer.layer.get_submodule(own.module), QUERY)
    if not queries or layer.base.outputs[queries].shape[-1] != found.sizes.heads * found.sizes.dim:
        raise NotDerivable("neither a config field nor a linear says how wide a head is")
    return replace(own, measure=queries)


def _own_config(
    model: PreTrainedModel, layer: nn.Module, found: Found, depth: int, place: str
) -> tuple[PreTrainedConfig, str, str]:
    """The config with the sizes of a stack, its path in that of the model, and its field with the number of layers.

    Raises:
        NotDerivable: no field says how many layers it has.
    """
    known: list[tuple[PreTrainedConfig, str, str]] = []
    for path, config in _configs_of(model, layer, found, depth, place):
        side = next((part for part in place.split(".") if part in ("encoder", "decoder")), "")
        names = (*of_stage(place, config)["layers"], f"{side}_layers", f"num_{side}_layers")
        field = find_field(config, "layers", depth, *names)
        if field and is_depth_field(model, place, path, field):
            return config, path, field
        known += [(config, path, field)] if field else []
    why = f"no config field says that it has {depth} layers"
    if (other := depth_field(model, place)) is not None:
        return dict(nested_configs(model.config))[other[0]], *other
    if not known:  # in a field that is made of others, such as a list of kinds
        known = [
            (config, path, name)
            for path, config in _configs_of(model, layer, found, depth, place)
            for name in FIELDS["layers"].split()
            if getattr(config, name, None) == depth
        ]
    if not known:
        raise NotDerivable(why)
    found.why.setdefault(LAYERS, why)  # but one says the same number
    return known[0]


def _configs_of(
    model: PreTrainedModel, layer: nn.Module, found: Found, depth: int, place: str
) -> Iterator[tuple[str, PreTrainedConfig]]:
    """The config that the attention reads, those of the towers around the layers, for towers may have as many layers
    as each other, and those that say these numbers of heads and layers."""
    configs = dict(nested_configs(model.config))
    parts = place.split(".")
    around = (model.base_model.get_submodule(".".join(parts[:end])) for end in range(len(parts) - 1, 0, -1))
    for module in (layer.get_submodule(found.attention.module), *around):
        own = getattr(module, "config", None)
        yield from ((path, config) for path, config in configs.items() if config is own)
    for path, config in configs.items():
        heads = of_stage(place, config)["heads"]
        if found.sizes is None or find_field(config, "heads", found.sizes.heads, *heads):
            yield path, config


def _fields(own: PreTrainedConfig, path: str, found: Found, layer: LayerRun, ffn: FFN) -> dict[str, Any]:
    """The names of the other config fields of a stack.

    Raises:
        NotDerivable: no field says how wide it is.
    """
    sizes, attention = found.sizes, found.attention
    side = next((part for part in path.split(".") if part in ("encoder", "decoder")), "")
    stage = of_stage(path, own)
    wide = layer.base.outputs[attention.output].shape[-1] if attention.output else None
    hidden = wide if wide is not None else any_hidden(own)
    fields: dict[str, Any] = {
        "hidden": find_field(own, "hidden", hidden, *stage["hidden"])
        or find_field(own, "hidden", any_hidden(own))
        or next(iter(stage["hidden"]), None),
        "neurons": width_said(ffn, own, f"{side}_ffn_dim").neurons,
        "heads": "",
    }
    if fields["hidden"] is None:
        raise NotDerivable("no config field says how wide it is")
    if fields["neurons"] is None:
        fields["num_neurons"] = ffn.num_neurons  # for this one config
    if sizes is None:
        return fields
    # Whisper calls other heads by the name of key/value heads
    fields["kv_heads"] = find_field(own, "kv_heads", sizes.kv_heads, mapped=False)
    fields["one_kv_head"] = sizes.kv_heads == 1 < sizes.heads
    names = (f"{side}_attention_heads", f"{side}_self_attention_heads")
    fields["heads"] = find_field(own, "heads", sizes.heads, *stage["heads"], *names) or ""
    head_dim = find_field(own, "head_dim", sizes.dim)
    fields["head_dim"] = head_dim if head_dim in getattr(type(own), "__dataclass_fields__", {}) else None
    if not fields["heads"]:
        found.why |= dict.fromkeys((CONVERT, HEADS), "no config field says how many heads it has")
    elif fields["kv_heads"] is None and sizes.kv_heads not in (1, sizes.heads):
        found.why |= dict.fromkeys((CONVERT, HEADS), "no config field says how many key/value heads it has")
    elif fields["head_dim"] is None and said(own, fields["hidden"]) != sizes.dim * sizes.heads:
        fields["head_size"] = sizes.dim
        try:
            found.attention = _measurable(layer, found)
        except NotDerivable as reason:
            if not (attention.routed and attention.output):  # which says it, too
                found.why.setdefault(CONVERT, str(reason))
            if not attention.output:
                found.why.setdefault(HEADS, str(reason))
    return fields


def _per_layer(stacks: list[Stack], config: PreTrainedConfig) -> tuple[str, ...]:
    """Fields of the configs that are lists with one entry for each layer of their stack."""
    names = set()
    for stack in stacks:
        own = stack.own_config(config)
        depth = said(own, stack.num_layers)
        known = getattr(type(own), "__dataclass_fields__", {})
        names |= {
            name
            for name, value in vars(own).items()
            if isinstance(value, list | tuple)
            and len(value) == depth
            and name in known
            and re.search("layer|type|pattern|window", name)
        }
    return tuple(sorted(names))
