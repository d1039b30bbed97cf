"""Is a derived entry right? Each ability is tried on the tiny model and compared with what must come out.

- `convert`: local attention with everything in view gives the model's own output, and with a small window that of the
  model's own attention under a banded mask.
- `heads`, `neurons`: cut out of some layers, the model gives what it gives when they contribute nothing.
- `layers`: without one layer it gives what it gives when that layer hands on its input.
- `experts`: without some of each layer it gives what it gives when the router's scores of these are -inf.

What fails is switched off, with the reason. The comparisons would notice: each also checks that the change matters.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...attention.config import MAX_WINDOW, AttentionConfig
from ...attention.deferred import Scores
from ...attention.watched import Watch, routing
from ...errors import UnsupportedModelError
from ..block import StackBlock
from ..cutting import cut_layers, cut_units, kept_heads, layer_fields
from ..family import ABILITIES, CONVERT, EXPERTS, HEADS, LAYERS, NEURONS, Family, Stack
from ..gaps import TENSOR, states_of
from ..groups import Group, groups_of, output_module, output_weight
from ..registry import forget, remember
from ..stacks import model_stacks
from .compare import decodes_alike, keeps_cache, outputs_of, run_in_training, text_of
from .expert_proof import prove_experts
from .head_parts import with_head_parts
from .observe import LayerRun, observing
from .roles import Heads, NotDerivable, other_numbers, said_of
from .trial import TOLERANCE, Trial, UnchangedError

WINDOW = 4


def prove(family: Family, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Family:
    """The entry with those of its abilities that the tiny model proves, stack by stack.

    Raises:
        NotDerivable: none is left.
    """
    expected = outputs_of(model, inputs)
    proofs: dict[str, Callable[..., None]] = {CONVERT: _convert, HEADS: _heads, NEURONS: _neurons, LAYERS: _layers}
    proofs |= {EXPERTS: prove_experts}
    try:
        for name in [stack.name for stack in family.stacks]:
            for ability, proof in proofs.items():
                family = _tried(ability, proof, name, family, model, inputs, expected)
        family = _alike_in_stages(family, model, inputs, expected)
    finally:
        forget(model.config)  # what was tried is no knowledge yet
    if all(family.why_not(ability) for ability in ABILITIES):
        raise NotDerivable("; ".join(dict.fromkeys(str(family.why_not(ability)) for ability in ABILITIES)))
    return family


def _alike_in_stages(family: Family, model: PreTrainedModel, *known: Any) -> Family:
    """The entry whose stages all lose layers the same way: windows that move by turns show in large images alone."""
    stages = [stack for stack in family.stacks if "." in stack.num_layers]
    if not any(stack.why_not(LAYERS) or stack.gaps is not None for stack in stages):
        return family
    for name in [stack.name for stack in stages if stack.gaps is None]:
        stack = next(one for one in model_stacks(model, family) if one.name == name)
        why, gapped = stack.entry.why_not(LAYERS), None
        if why is None:
            remember(model.config, family)
            gapped = _with_proven_gaps(Trial(stack, family, model, *known))
        family = gapped or family.without(LAYERS, why or "other stages cannot lose any", name)
    return family


def _tried(
    ability: str, proof: Callable[..., None], name: str, family: Family, model: PreTrainedModel, *known: Any
) -> Family:
    """The entry after one ability of one stack was tried: as it was, mended, or without the ability."""
    stack = next(stack for stack in model_stacks(model, family) if stack.name == name)
    if stack.entry.why_not(ability) is not None:
        return family
    remember(model.config, family)
    trial = Trial(stack, family, model, *known)
    try:
        proof(trial)
        return family
    except Exception as error:  # whatever the code of a model may raise
        return _second_try(trial, ability) or family.without(ability, said_of(error), name)


def _second_try(trial: Trial, ability: str) -> Family | None:
    """Another entry that is proven: the attention reads its head counts from its config, or from other numbers than
    their names say; some FFNs stay; the first layer is unlike the others and stays, or layers leave gaps."""
    proof = {HEADS: _heads, NEURONS: _neurons, LAYERS: _layers}.get(ability)
    with suppress(Exception):  # whatever the code of a model may raise
        for family in _other_entries(trial, ability):
            stack = next(one for one in model_stacks(trial.model, family) if one.name == trial.stack.name)
            remember(trial.model.config, family)
            with suppress(Exception):
                assert proof is not None
                proof(replace(trial, stack=stack, family=family))
                return family
    return None


def _other_entries(trial: Trial, ability: str) -> Iterator[Family]:
    entry, family = trial.stack.entry, trial.family
    if ability == HEADS:
        stack, own = trial.stack, entry.attention
        sizes = Heads(stack.num_heads, stack.num_kv_heads, stack.head_width, stack.head_width)
        module = stack.layers[stack.attending[0]].get_submodule(own.module)
        layer = stack.layers[stack.attending[0]]
        parts = with_head_parts(layer, replace(own, per_head=(), per_head_dims=()), sizes.heads, sizes.dim)
        alone = (replace(own, shared=(), shared_dims=()),) if own.shared else ()
        for attention in (own, *alone, *parts, *other_numbers(module, own, sizes)):
            other = replace(entry, attention=attention)
            for one in (_with_own_config(other), other):
                yield replace(family, stacks=tuple(one if old is entry else old for old in family.stacks))
    elif ability == NEURONS and len(trial.stack.ffns) > 1:
        yield _provable_ffns(trial)
    elif ability == LAYERS:
        if not family.first_stays:
            yield replace(family, first_stays=True)
        gapped = _with_gaps(trial)
        yield gapped
        yield replace(gapped, first_stays=True)


def _provable_ffns(trial: Trial) -> Family:
    """The entry with those FFNs of the stack alone of which each is proven by itself."""
    entry, proven = trial.stack.entry, []
    for kind in trial.stack.ffns:
        with suppress(Exception):  # whatever the code of a model may raise
            _units(trial, kind)
            proven.append(kind)
    if "neurons" not in proven:
        entry = replace(entry, up=(), down="", neurons=None, num_neurons=None)
    entry = replace(entry, more_ffns=tuple(ffn for ffn in entry.more_ffns if ffn.kind in proven))
    stacks = tuple(entry if one.name == entry.name else one for one in trial.family.stacks)
    return replace(trial.family, stacks=stacks)


def _convert(trial: Trial) -> None:
    try:
        _windows(trial)
    except UnchangedError:
        _windows(trial.looking_inside())


def _windows(trial: Trial) -> None:
    stack = trial.stack
    modules = {stack.layers[index].get_submodule(stack.entry.attention.module) for index in stack.attending}

    def everywhere(attention: AttentionConfig) -> StackBlock:
        full = AttentionConfig()
        return StackBlock(tuple(attention if i in stack.attending else full for i in range(len(stack.layers))))

    for window in (MAX_WINDOW, WINDOW, 1):

        def masked(module: nn.Module, mask: Tensor | None, queries: int, keys: int, window: int = window) -> Any:
            return _banded(mask, queries, keys, stack.is_causal, window) if module in modules else mask

        def attend(watch: Watch, weights: Scores, value: Tensor, window: int = window) -> Tensor:
            return weights.tensor(lambda scores: _banded(scores, *scores.shape[-2:], stack.is_causal, window)) @ value

        attention = AttentionConfig("local", window=window, global_tokens=0)
        converted, is_wide = trial.rebuilt(everywhere(attention)), window == MAX_WINDOW
        routed = modules if stack.entry.attention.routed and not is_wide else ()
        with observing(trial.model, masked), routing(routed, attend):
            wanted = trial.expected if is_wide else outputs_of(trial.model, trial.inputs, trial.inside)
        said = "with everything in view" if is_wide else f"with a window of {window} tokens"
        trial.compare(converted, wanted, said)
        if not is_wide and trial.matters(wanted):  # few tokens, as of a masked autoencoder, want a smaller one
            break
    trial.check_matters(wanted, said)
    if stack.entry.attention.routed:
        run_in_training(converted, trial.inputs)
    text = text_of(trial.inputs)
    if stack.is_causal and decodes_alike(trial.model, text, TOLERANCE):
        kinds = [converted]
        with suppress(UnsupportedModelError):  # by masks and biases that a kind which keeps all keys has no place for
            keeps_keys = trial.rebuilt(everywhere(AttentionConfig("strided")))
            outputs_of(keeps_keys, trial.inputs)
            kinds.append(keeps_keys)
        for kind in kinds:
            if not decodes_alike(kind, text, TOLERANCE):
                raise NotDerivable("from a cache it decodes otherwise than in one pass")


def _banded(mask: Tensor | None, queries: int, keys: int, causal: bool, window: int) -> Tensor:
    """A mask `[..., queries, keys]` that also hides what is too far away."""
    i, j = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)[None]
    far = (i - j >= window) | (j > i) if causal else (i - j).abs() > window
    if mask is None:
        return torch.zeros(1, 1, queries, keys).masked_fill(far, torch.finfo(torch.float32).min)
    return mask & ~far if mask.dtype == torch.bool else mask.masked_fill(far, torch.finfo(mask.dtype).min)


def _heads(trial: Trial) -> None:
    for kind in trial.stack.attentions:
        _units(trial, kind)


def _with_own_config(entry: Stack) -> Stack:
    """The same stack, whose attention reads its sizes from its config."""
    cross = entry.cross_attention and replace(entry.cross_attention, reads_config=True)
    return replace(entry, attention=replace(entry.attention, reads_config=True), cross_attention=cross)


def _neurons(trial: Trial) -> None:
    for kind in trial.stack.ffns:
        _units(trial, kind)


def _units(trial: Trial, kind: str) -> None:
    """One unit (as many as have to leave together) leaves the first layer, another the last; those between keep all,
    so that layers become unlike."""
    stack, model = trial.stack, trial.model
    groups = [group for group in groups_of(stack) if group.kind == kind]
    if not groups:
        raise NotDerivable(f"no layer has {kind}")
    gone = {group.name: range(0) for group in groups}
    gone[groups[-1].name] = range(groups[-1].units - groups[-1].step, groups[-1].units)
    gone[groups[0].name] = range(groups[0].step)
    kept = {group.name: [unit for unit in range(group.units) if unit not in gone[group.name]] for group in groups}
    counts = {layer: len(kept[group.name]) for group in groups for layer in group.layers}
    most = max(counts.values())
    sizes = {kind: tuple(counts.get(layer, most) for layer in range(len(stack.layers)))}
    if kind == "heads" and stack.group_size > 1:
        sizes |= {"kv_heads": sizes["heads"], "heads": tuple(count * stack.group_size for count in sizes["heads"])}
    heads = kept_heads(stack, kept) if kind == "heads" else ()
    small = trial.rebuilt(StackBlock(sizes=sizes, kept_heads=heads), cut_units(model.state_dict(), groups, kept))
    with ExitStack() as hooks:
        for group in groups:
            for unit in gone[group.name]:
                _silence(model, group, unit, hooks)
        wanted = outputs_of(model, trial.inputs)
    trial.compare(small, wanted, f"without some {kind}")
    trial.check_matters(wanted, f"without some {kind}")


def _silence(model: PreTrainedModel, group: Group, unit: int, hooks: ExitStack) -> None:
    """The linear that reads the units gets zeros from one of them; experts do not read it."""
    for member in group.members:
        weight = output_weight(model, member)
        if weight.ndim == 3:
            whole = weight.detach().clone()
            hooks.callback(weight.data.copy_, whole)
            weight.data.select(member.output.dim, unit).zero_()
            continue
        reader, width = output_module(model, member), member.output.width

        def without(module: nn.Module, args: tuple, width: int = width) -> tuple:
            given = args[0].clone()
            given[..., unit * width : (unit + 1) * width] = 0
            return (given, *args[1:])

        hooks.callback(reader.register_forward_pre_hook(without).remove)


def _layers(trial: Trial) -> None:
    stack, family = trial.stack, trial.family
    if len(stack.layers) < 2:
        raise NotDerivable("there is one layer alone")
    has_gaps = stack.entry.gaps is not None
    if family.first_stays and len(stack.layers) < 3 and not has_gaps:
        raise NotDerivable("in a tiny model no layer takes the place of another")
    matters = []
    for index in range(int(family.first_stays), len(stack.layers)):
        kept = [layer for layer in range(len(stack.layers)) if layer != index]
        left = tuple(one.with_layers(kept) if one is stack.entry else one for one in family.stacks)
        fields = stack.changed({}, layer_fields(stack, kept))
        state = cut_layers(trial.model.state_dict(), stack, kept)
        small = replace(trial, family=replace(family, stacks=left)).rebuilt(StackBlock(), state, **fields)
        if has_gaps and stack.is_causal:  # first, for some models remember the places of their last images
            _check_cache(trial, small, index)
        handle = stack.layers[index].register_forward_hook(hand_on, with_kwargs=True, prepend=True)
        try:
            wanted = outputs_of(trial.model, trial.inputs)
        finally:
            handle.remove()
        trial.compare(small, wanted, f"without layer {index}")
        matters.append(trial.matters(wanted))
    unread = [index for index, one in enumerate(matters, int(family.first_stays)) if not one]
    if unread and not (has_gaps and any(matters)):  # where all keep their places it may well be that one is not read
        raise NotDerivable(f"without layer {unread[0]}, the output of a tiny model stays the same")


def _check_cache(trial: Trial, small: PreTrainedModel, index: int) -> None:
    """Caches ask some layer how long a text is, which may be an empty one now.

    Raises:
        NotDerivable: it decodes otherwise from a cache than in one pass, or nothing shows that it does not.
    """
    is_alike = decodes_alike(small, text_of(trial.inputs), TOLERANCE) if keeps_cache(small) else True
    if is_alike is None:
        raise NotDerivable("how it decodes from a cache with fewer layers could not be tried")
    if not is_alike:
        raise NotDerivable(f"without layer {index}, it decodes otherwise from a cache than in one pass")


def hand_on(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """A hook that makes a layer do nothing."""
    states = states_of(args, kwargs)
    return states if isinstance(output, Tensor) else (states, *output[1:])


def _with_proven_gaps(trial: Trial) -> Family | None:
    with suppress(Exception):  # whatever the code of a model may raise
        family = _with_gaps(trial)
        remember(trial.model.config, family)
        stack = next(one for one in model_stacks(trial.model, family) if one.name == trial.stack.name)
        _layers(replace(trial, stack=stack, family=family))
        return family
    return None


def _has_residual(trial: Trial) -> bool:
    """Whether a layer without weights still gives what it is given: else an empty one would add it once more (XLM)."""
    layer = LayerRun(trial.model, trial.stack.layers[-1], trial.inputs)
    weights = [one for one in layer.layer.parameters() if one.ndim > 1]
    before = [one.detach().clone() for one in weights]
    with torch.no_grad():
        try:
            for weight in weights:
                weight.zero_()
            result = layer.run().result
        finally:
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)
    return result is not None and bool(result.flatten(0, -2).std(0).max() > TOLERANCE)


def _with_gaps(trial: Trial) -> Family:
    """The entry in which layers of the stack leave gaps.

    Raises:
        NotDerivable: what they give is neither a tensor nor a tuple that begins with one.
    """
    given: set[int | None] = set()

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        is_tuple = type(output) is tuple and isinstance(output[0], Tensor)
        given.add(TENSOR if isinstance(output, Tensor) else len(output) if is_tuple else None)

    with ExitStack() as hooks:
        for layer in trial.stack.layers:
            hooks.callback(layer.register_forward_hook(note).remove)
        outputs_of(trial.model, trial.inputs)
    if len(given) != 1 or None in given:
        raise NotDerivable("its layers give more than one tensor")
    if not _has_residual(trial):
        raise NotDerivable("its layers are added to the residual stream by what is around them")
    entry = replace(trial.stack.entry, gaps=given.pop())
    return replace(
        trial.family, stacks=tuple(entry if one is trial.stack.entry else one for one in trial.family.stacks)
    )
