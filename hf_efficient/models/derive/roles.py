"""Which linear of a layer does what, found by disturbing one and seeing what changes.

- The linear that *reads* the heads is the one whose input is the attention's output.
- The linears that *make* query, key and value are those whose noise arrives there without passing another such linear.
- The units of a maker belong to the heads whose query, key or value they change.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModelError
from ..family import Attention
from .head_parts import with_head_parts
from .observe import SMALL, Call, LayerRun, Seen, differs, is_same

QKV = "qkv"
MOST_NUMBERS = 4  # beside the weights of an attention that are tried
QUERY = 0  # its place in QKV
# Integers beside the weights that are heads x head_dim; others of the same value may be the hidden size.
WIDTHS = ("all_head_size", "inner_dim", "split_size", "embed_dim", "attention_head_size", "hidden_size")


class NotDerivable(UnsupportedModelError):
    """What stands in the way of an ability, in one line."""


def said_of(error: Exception) -> str:
    """An error in one line; whose it is, if it is not ours."""
    kind = "" if isinstance(error, UnsupportedModelError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())[:300]}"


class Heads(NamedTuple):
    """The sizes of one attention. `value_dim` differs from `dim` in latent attention (MLA)."""

    heads: int
    kv_heads: int
    dim: int
    value_dim: int

    @classmethod
    def of(cls, call: Call) -> "Heads":
        return cls(call.query.shape[1], call.key.shape[1], call.query.shape[3], call.value.shape[3])


def attention_call(seen: Seen, module: nn.Module) -> Call:
    """The call that an attention module makes; of several, one for each image or sound, all tokens together.

    Raises:
        NotDerivable: it makes none, or calls attention again for the same tokens.
    """
    calls = [call for call in seen.calls if call.module is module]
    if len(calls) == 1:
        return calls[0]
    sizes = {(call.query.shape[0], *Heads.of(call)) for call in calls}
    if len(sizes) != 1 or next(iter(sizes))[0] != 1:
        raise NotDerivable(f"{type(module).__name__} calls attention {len(calls)} times in one forward of its layer")
    query, key, value = (torch.cat([call.tensors[i] for call in calls], 2) for i in range(3))
    output = torch.cat([call.output for call in calls], 1)
    return replace(calls[0], query=query, key=key, value=value, output=output)


def attention_roles(layer: LayerRun, path: str) -> Attention:
    """The projections of the attention module at a path inside the layer.

    Raises:
        NotDerivable: heads that are not separate units of one linear each.
    """
    module = layer.layer.get_submodule(path)
    call = attention_call(layer.base, module)
    sizes = Heads.of(call)
    try:
        attention = _plain_roles(layer, module, call, sizes)
    except NotDerivable as reason:
        try:
            attention = _roles_by_blocks(layer, module, call, sizes)
        except NotDerivable:
            raise reason from None
    attention = replace(attention, module=path, **integers_of(module, sizes))
    return next(with_head_parts(layer.layer, attention, sizes.heads, sizes.dim))


def _plain_roles(layer: LayerRun, module: nn.Module, call: Call, sizes: Heads) -> Attention:
    """The roles of linears that give each head as many units as its query, key or value has."""
    if sizes.value_dim != sizes.dim:
        raise NotDerivable("values of another width than queries (latent attention)")
    makers = dict(zip(QKV, (maker(layer, module, letter) for letter in range(3)), strict=True))
    together = {name: "".join(letter for letter in QKV if makers[letter] == name) for name in makers.values()}
    owners = {name: _owners(layer, module, name, letters, call) for name, letters in together.items()}
    layouts = {name: layout(owners[name], together[name], sizes) for name in owners}
    if len(set(layouts.values())) > 1:
        raise NotDerivable(f"projections of several layouts: {layouts}")
    reader, gates = _reader(layer, call, set(makers.values()))
    return Attention(
        module="",
        query=makers["q"],
        key=makers["k"],
        value=makers["v"],
        output=reader,
        gates=gates,
        interleaved=next(iter(layouts.values())) == "interleaved",
    )


def _roles_by_blocks(layer: LayerRun, module: nn.Module, call: Call, sizes: Heads) -> Attention:
    """The roles where a linear gives each head one block of units, whatever these are: parts of keys and values
    (latent attention), a query and a gate. Linears of which each unit reaches all heads stay."""
    group, makers = sizes.heads // sizes.kv_heads, {}
    for name in layer.linears:
        seen = layer.disturbed(name)
        if not any(one.module is module for one in seen.calls):
            continue
        new = attention_call(seen, module).tensors
        if not any(differs(one, old) for one, old in zip(new, call.tensors, strict=True)):
            continue
        owners = _owners(layer, module, name, QKV, call)
        reached = [{head // (group if letter == "q" else 1) for letter, head in one} for one in owners]
        if all(len(one) in (0, sizes.kv_heads) for one in reached):
            continue
        size = len(reached) // sizes.kv_heads
        blocks = [set().union(*reached[unit * size : (unit + 1) * size]) for unit in range(sizes.kv_heads)]
        if len(reached) % sizes.kv_heads or blocks != [{unit} for unit in range(sizes.kv_heads)]:
            raise NotDerivable("the heads lie in the projections in an order of their own")
        for letter in {letter for one in owners for letter, _ in one}:
            makers.setdefault(letter, []).append(name)
    if sorted(makers) != sorted(QKV) or any(len(names) > 1 for names in makers.values()):
        raise NotDerivable("queries, keys or values are not made by one linear each")
    query, key, value = (makers[letter][0] for letter in QKV)
    reader, gates = _reader(layer, call, {query, key, value}, may_hold_gates=True)
    return Attention(
        module="",
        query=query,
        key=key,
        value=value,
        output=reader,
        gates=gates,
        wide=tuple(dict.fromkeys((query, key, value))),
        value_size=sizes.value_dim if sizes.value_dim != sizes.dim else None,
    )


def _reader(
    layer: LayerRun, call: Call, makers: set[str], may_hold_gates: bool = False
) -> tuple[str, tuple[str, ...]]:
    """The linear that reads the heads, and the linears that make gates between the attention and it: others, or
    among those of the projections.

    Raises:
        NotDerivable: several, or something else is between them.
    """
    same = [name for name, given in layer.base.inputs.items() if is_same(given, call.output)]
    if len(same) == 1:
        return same[0], ()
    reached = [name for name in layer.linears if all(layer.reaches(one, name) for one in makers)]
    first = [name for name in reached if not any(layer.reaches(other, name) for other in reached)]
    if same or len(first) != 1 or layer.base.inputs[first[0]].numel() != call.output.numel():
        raise NotDerivable(f"{len(same)} linears read the heads as they are")
    arriving = [name for name in layer.linears if layer.reaches(name, first[0])]
    gates = tuple(name for name in layer.last(arriving) if name not in makers)
    heads, given = call.query.shape[1], layer.base.inputs[first[0]]
    if not gates and is_same(given.flatten().sort().values, call.output.flatten().sort().values):
        return first[0], ()  # in another order of rows and tokens
    if not (gates or may_hold_gates) or any(layer.base.outputs[gate].shape[-1] % heads for gate in gates):
        raise NotDerivable("a norm over all heads, or the like, between the attention and the linear that reads it")
    return first[0], gates


def integers_of(module: nn.Module, sizes: Heads) -> dict[str, tuple[str, ...]]:
    """The integers that an attention module keeps beside its weights and that count heads."""
    integers = {name: value for name, value in vars(module).items() if type(value) is int}
    heads = [name for name, value in integers.items() if value == sizes.heads and "head" in name]
    heads = [name for name in heads if not any(word in name for word in ("dim", "size", "kv", "key", "group"))]
    kv_heads = [n for n, value in integers.items() if value == sizes.kv_heads and re.search("kv|key_value", n)]
    widths = [name for name, value in integers.items() if value == sizes.heads * sizes.dim and name in WIDTHS]
    return {
        "head_attributes": tuple(heads),
        "kv_attributes": tuple(name for name in kv_heads if "group" not in name and "head" in name),
        "width_attributes": tuple(widths),
    }


def other_numbers(module: nn.Module, attention: Attention, sizes: Heads) -> Iterator[Attention]:
    """The attention with other integers that count heads, whatever they are called: the fewest first, so that none is
    among them without need."""
    whole, part = sizes.heads * sizes.dim, sizes.kv_heads * sizes.dim
    roles = {whole: "width_attributes", part: "kv_width_attributes"} if whole != part else {whole: "width_attributes"}
    roles |= {sizes.kv_heads: "kv_attributes"} | {sizes.heads: "head_attributes"}
    known = {name for role in roles.values() for name in getattr(attention, role)}
    numbers = {n: value for n, value in vars(module).items() if type(value) is int and value in roles}
    others = [name for name in numbers if name not in known][:MOST_NUMBERS]
    for count in range(1, len(others) + 1):
        for chosen in combinations(others, count):
            added: dict[str, tuple[str, ...]] = {}
            for name in chosen:
                role = roles[numbers[name]]
                added[role] = (*added.get(role, getattr(attention, role)), name)
            yield replace(attention, **added)


def maker(layer: LayerRun, module: nn.Module, letter: int) -> str:
    """The last linear on the way to query, key or value."""
    base = attention_call(layer.base, module).tensors[letter]
    arriving = []
    for name in layer.linears:
        seen = layer.disturbed(name)
        is_called = any(call.module is module for call in seen.calls)
        if is_called and differs(attention_call(seen, module).tensors[letter], base):
            arriving.append(name)
    last = layer.last(arriving)
    if len(last) != 1:
        raise NotDerivable(f"{len(last)} linears make the {('queries', 'keys', 'values')[letter]}")
    return last[0]


def _owners(layer: LayerRun, module: nn.Module, name: str, letters: str, base: Call) -> list[set[tuple[str, int]]]:
    """For each output of a linear that makes these of query, key and value, the heads that it reaches: {("q", 0)}."""
    output = layer.base.outputs[name]
    places = output.shape[:-1]
    owners: list[set[tuple[str, int]]] = [set() for _ in range(output.shape[-1])]
    if output.ndim == 4 and output.shape[1] == 1:  # latents, as the one head of a cache
        output = output[:, 0]
    if output.ndim > 3:
        raise NotDerivable(f"a linear gives {output.ndim} dimensions instead of batch, tokens and units")
    # of two dimensions: the tokens of all images one after another
    for units in rounds(output[None] if output.ndim == 2 else output):
        call = attention_call(layer.run(name, units.view(places)), module)
        for letter, new, old in zip(QKV, call.tensors, base.tensors, strict=True):
            if letter not in letters:
                continue
            if new.shape != old.shape or (new.shape[0], new.shape[2]) != units.shape:
                raise NotDerivable("attention is not computed token by token of its projections")
            hit = (new - old).abs().amax(-1) > SMALL * old.abs().max()  # [batch, heads, length]
            if (hit.any(1) & (units < 0)).any():
                raise NotDerivable("a projection reaches other tokens than its own")
            for row, head, token in hit.nonzero().tolist():
                owners[units[row, token]].add((letter, head))
    return owners


def rounds(output: Tensor) -> Iterator[Tensor]:
    """`[batch, length]` tensors that together give every unit of an output a token; of an image there are rows and
    columns of tokens."""
    places = output.shape[:-1].numel()
    for first in range(0, output.shape[-1], places):
        units = torch.full((places,), -1)
        count = min(places, output.shape[-1] - first)
        units[:count] = torch.arange(first, first + count)
        yield units.view(output.shape[:-1])


def layout(owners: list[set[tuple[str, int]]], letters: str, sizes: Heads) -> str:
    """How the units of a linear that makes these of query, key and value lie: in `blocks`, q | k | v, or
    `interleaved`, one key/value head after another, each with its queries.

    Raises:
        NotDerivable: they lie otherwise, or a unit reaches several heads.
    """
    counts = {"q": sizes.heads, "k": sizes.kv_heads, "v": sizes.kv_heads}
    group = sizes.heads // sizes.kv_heads
    blocks = [{(letter, head)} for letter in letters for head in range(counts[letter]) for _ in range(sizes.dim)]
    if owners == blocks:
        return "blocks"
    interleaved = [
        {(letter, head)}
        for unit in range(sizes.kv_heads)
        for letter in letters
        for head in (range(unit * group, (unit + 1) * group) if letter == "q" else (unit,))
        for _ in range(sizes.dim)
    ]
    if owners == interleaved:
        return "interleaved"
    if any(len({head for letter, head in one if letter == other}) > 1 for one in owners for other in letters):
        raise NotDerivable("an output of a projection belongs to several heads (a norm over all of them)")
    raise NotDerivable("the heads lie in the projections in an order of their own")


def norm_place(layer: LayerRun, readers: Sequence[str]) -> str | None:
    """How the blocks of a layer, which end in these linears, meet the residual stream: `"pre"`, `"post"`, or None for
    anything else."""
    result, states = layer.base.result, layer.states
    if result is None or states is None or states.shape != result.shape:
        return None
    blocks = [layer.base.outputs[name] for name in readers]
    if all(block.numel() == result.numel() for block in blocks):
        total = states + sum(block.reshape(result.shape) for block in blocks)
        if torch.allclose(total, result, rtol=1e-4, atol=1e-4):
            return "pre"
    norms = [module for module in layer.layer.modules() if "norm" in type(module).__name__.lower()]
    given: list[Tensor] = []
    hooks = [norm.register_forward_hook(lambda m, a, o: given.append(o)) for norm in norms]
    try:
        last = layer.run().result
    finally:
        for hook in hooks:
            hook.remove()
    is_post = any(isinstance(one, Tensor) and one.shape == last.shape and torch.equal(one, last) for one in given)
    return "post" if is_post else None
