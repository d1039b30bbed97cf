"""The heads of a model that computes its attention itself, found without seeing a query, key or value.

Attention is where tokens meet. One linear *reads* the heads: the first whose input changes at other tokens than the
one that was disturbed. Of the linears before it, a unit that changes the reader

- at its own token alone, in all units of one head, belongs to a *query*;
- at other tokens, in all units of one head, to a *key*;
- at other tokens, in one unit (of each query head of its group), to a *value*.
"""

import dis
import inspect
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ..family import CONVERT, HEADS, Attention
from .head_parts import with_head_parts
from .observe import SMALL, LayerRun, differs, run
from .roles import Heads, NotDerivable, integers_of, layout, said_of
from .watching import found_by_watching, watched_attention

WORDS = "softmax", "attention"  # in the names of whatever computes it
PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}  # of scores with values: a softmax alone may be one over classes
ROW, TOKEN = 1, 2  # of what is disturbed: the second text has no padding


def own_attention(layer: LayerRun) -> tuple[Attention, Heads, bool, dict[str, str]]:
    """The attention of a layer that does not call the interface, its sizes, whether it sees no later tokens, and why
    it lacks which abilities.

    Raises:
        NotDerivable: it has none, or several.
    """
    try:
        attention, sizes, is_causal = unseen_attention(layer)
    except Exception as reason:  # whatever the code of a model may raise
        try:
            return *found_by_watching(layer), {HEADS: said_of(reason)}
        except Exception:
            raise reason from None
    try:
        return watched_attention(layer, attention, sizes), sizes, is_causal, {}
    except Exception as reason:
        return attention, sizes, is_causal, {CONVERT: said_of(reason)}


def unseen_attention(layer: LayerRun) -> tuple[Attention, Heads, bool]:
    """The projections of the only attention of a layer, its sizes, and whether it sees no later tokens.

    Raises:
        NotDerivable: tokens do not meet in one place, or heads are not separate units.
    """
    reader = _reader(layer)
    makers = _makers(layer, reader)
    sets: dict[str, list[tuple[str, frozenset[int]]]] = {name: [] for name in makers}
    is_causal = True
    for name in makers:
        for unit in range(layer.base.outputs[name].shape[-1]):
            hit = _hit(layer, name, unit, reader)  # [tokens, units of the reader]
            own = frozenset(hit[TOKEN].nonzero().flatten().tolist())
            others = hit.clone()
            others[TOKEN] = False
            is_causal &= not bool(others[:TOKEN].any())
            far = frozenset(others.any(0).nonzero().flatten().tolist())
            sets[name].append(("away", far) if far else ("here", own))
    return _described(layer, reader, sets, is_causal)


def attends(model: PreTrainedModel, layers: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Whether there may be softmax attention in some modules: a softmax is computed in them, or, where they are not
    reached, their code names one whose result is multiplied with something.

    Lists of modules without any, such as those that merge the patches of an image or say how sure a box is (D-FINE),
    have nothing to convert.
    """
    noted = _Softmax()
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(lambda *given: noted.enter()).remove)
            hooks.callback(layer.register_forward_hook(lambda *given: noted.leave()).remove)
        with noted:
            run(model, inputs)
    return noted.found if noted.is_reached else any(_names_softmax(type(module)) for module in layers.modules())


def _names_softmax(kind: type[nn.Module]) -> bool:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    names = {name.lower() for name in code.co_names} if code is not None else set()
    multiplies = names & PRODUCTS or any(one.argrepr == "@" for one in dis.get_instructions(code or ""))
    return any("attention" in name or ("softmax" in name and multiplies) for name in names)


class _Softmax(TorchDispatchMode):
    """Notes a softmax, alone or in fused attention, while inside of the modules that are looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.is_reached, self.found = 0, False, False

    def enter(self) -> None:
        self.inside, self.is_reached = self.inside + 1, True

    def leave(self) -> None:
        self.inside -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= self.inside > 0 and any(word in str(func) for word in WORDS)
        return func(*args, **(kwargs or {}))


def _reader(layer: LayerRun) -> str:
    """The linear that reads the heads: the first in whose input tokens have met."""
    met = {
        other
        for name in layer.linears
        if layer.base.outputs[name].ndim == 3
        for other in layer.linears
        if other != name and _meets(layer, name, other)
    }
    first = [name for name in met if not any(layer.reaches(other, name) for other in met)]
    if len(first) != 1:
        raise NotDerivable(f"its tokens meet in {len(first) or 'no'} places")
    return first[0]


def _meets(layer: LayerRun, name: str, other: str) -> bool:
    given = layer.base.inputs[other]
    tokens = given.shape[:2]
    if given.ndim != 3 or tokens != layer.base.outputs[name].shape[:2] or tokens[0] <= ROW or tokens[1] <= TOKEN:
        return False  # such as those of a table of relative positions
    hit = _difference(layer.disturbed_token(name, ROW, TOKEN).inputs.get(other), given)[ROW].any(-1)
    hit[TOKEN] = False
    return bool(hit.any())


def _difference(new: Tensor | None, old: Tensor) -> Tensor:
    if new is None or new.shape != old.shape:
        return torch.zeros_like(old, dtype=torch.bool)
    return (new - old).abs() > SMALL * old.abs().max()


def _makers(layer: LayerRun, reader: str) -> list[str]:
    """The last linears before the reader."""
    given = layer.base.inputs[reader]
    arriving = [n for n in layer.linears if n != reader and differs(layer.disturbed(n).inputs.get(reader), given)]
    return [name for name in layer.last(arriving) if layer.base.outputs[name].shape[:2] == given.shape[:2]]


def _hit(layer: LayerRun, name: str, unit: int, reader: str) -> Tensor:
    units = torch.full(layer.base.outputs[name].shape[:2], -1)
    units[ROW, TOKEN] = unit
    return _difference(layer.run(name, units).inputs.get(reader), layer.base.inputs[reader])[ROW]


def _described(
    layer: LayerRun, reader: str, sets: dict[str, list[tuple[str, frozenset[int]]]], is_causal: bool
) -> tuple[Attention, Heads, bool]:
    width = layer.base.inputs[reader].shape[-1]
    here = Counter(len(units) for one in sets.values() for where, units in one if where == "here" and units)
    if not here:
        raise NotDerivable("no linear makes the queries")
    dim = here.most_common(1)[0][0]
    away = [units for one in sets.values() for where, units in one if where == "away"]
    group = max(min((len(units) for units in away), default=1), 1)  # a value reaches one unit of each query head
    if width % (dim * group) or dim < 2:
        raise NotDerivable("its heads are not separate units of the linear that reads them")
    sizes = Heads(width // dim, width // dim // group, dim, dim)
    owners: dict[str, list[set[tuple[str, int]]]] = {name: [] for name in sets}
    for name, units_of in sets.items():
        for where, units in units_of:
            letter = "q" if where == "here" else "v" if len(units) == group else "k"
            span = {"q": dim, "k": dim * group}.get(letter)
            first = min(units, default=0)
            if span and units != set(range(first, first + span)):
                raise NotDerivable("an output of a projection belongs to several heads")
            owners[name].append({(letter, first // dim if letter == "q" else first // (dim * group))})
    letters = {
        name: "".join(dict.fromkeys(one for units in found for one, _ in sorted(units)))
        for name, found in owners.items()
    }
    if sorted("".join(letters.values())) != ["k", "q", "v"]:
        raise NotDerivable(f"several linears make queries, keys or values: {letters}")
    layouts = {layout(owners[name], letters[name], sizes) for name in owners}
    if len(layouts) > 1:
        raise NotDerivable("projections of several layouts")
    maker = {letter: name for name, held in letters.items() for letter in held}
    path = _common(maker.values())
    module = layer.layer.get_submodule(path)
    attention = Attention(
        module=path,
        query=maker["q"],
        key=maker["k"],
        value=maker["v"],
        output=reader,
        interleaved=layouts == {"interleaved"},
        **integers_of(module, sizes),
    )
    return next(with_head_parts(layer.layer, attention, sizes.heads, sizes.dim)), sizes, is_causal


def _common(paths) -> str:
    """The module that holds them all."""
    parts = [path.split(".")[:-1] for path in paths]
    common = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)
