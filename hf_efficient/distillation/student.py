"""A student made of its teacher: embeddings, head and some of the layers.

    student = build_student(teacher, layers=3)                                # first, middle and last layer
    student = build_student(teacher, layers=[0, 2, 4])
    student = build_student(t5, layers={"decoder": 2}, layer_map="last")      # distil-whisper: a whole encoder
    student = build_student(teacher, layers=3, heads=6, neurons=768)          # narrower layers too
    student = build_student(teacher, layers=3, hidden_size=192, calibration=batches)      # and a narrower stream

Kept teacher layers are a far better start than a fresh small model (DistilBERT, Sanh et al. 2019).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from ..errors import ConfigError, unknown_name
from ..models.anatomy import Anatomy
from ..models.classes import block_of
from ..models.rebuild import check_model
from ..pruning.cut.surgery import apply_plan
from ..pruning.plan import PruningPlan
from ..pruning.score.calibration import check_calibration
from ..pruning.score.handing import Batch
from ..pruning.score.units import activation, magnitude
from .layer_map import chosen_layers
from .narrow import heads_for, narrow
from .options import MAPS

Layers = int | Sequence[int]


def build_student(
    teacher: PreTrainedModel,
    layers: Layers | Mapping[str, Layers] | None = None,
    *,
    layer_map: str = "linspace",
    heads: int | None = None,
    neurons: int | None = None,
    hidden_size: int | None = None,
    calibration: Iterable[Batch] | None = None,
) -> PreTrainedModel:
    """A new, independent model of the teacher's class that keeps `layers` of it; weights are copied.

    Parameters:
        layers: how many layers to keep, or which (from 0, in rising order). In encoder-decoders it goes for both
            stacks; a mapping `{"encoder": ..., "decoder": ...}` treats them apart, and a stack that it does not name
            stays whole. `None`: all layers.
        heads: how many attention heads each layer keeps; under grouped-query attention, key/value heads with their
            query heads.
        neurons: how many neurons each feed-forward network keeps.
        hidden_size: the width of the hidden states. Heads keep their dimension: where they fill the width (BERT,
            GPT-2, BART) it must be a multiple of that, and there are as many heads as fill it.
        layer_map: which layers a number means: `linspace` (from the first to the last), `uniform` or `last`.
        calibration: a few batches, to choose by what the model does with them.

    The heads, neurons and dimensions with the largest weights stay (Li et al. 2017); with `calibration` those that are
    largest in what the next linear makes of them (heads, neurons) and in what the norms give (dimensions, Minitron).
    `prune` chooses heads and neurons better, and can treat layers differently. Without `hidden_size` the hidden states
    stay as wide as the teacher's, so that the `hidden` loss needs no projection.

    The config remembers the kept layers, and `DistillationArguments(layer_map="auto")` follows them.

    Raises:
        ConfigError: a stack, layer, or number of heads or neurons that the teacher does not have, or a width that its
            config cannot say.
        DataError: `calibration` gives no batches of inputs of the model.
        UnsupportedModelError: a model outside the table of families, quantised, or wrapped by PEFT; one whose width
            cannot be changed.
    """
    anatomy = Anatomy.of(check_model(teacher))
    depths = {stack.name: len(stack.layers) for stack in anatomy.stacks}
    if layer_map not in MAPS or layer_map == "auto":
        raise unknown_name("layer_map", layer_map, [name for name in MAPS if name != "auto"])
    chosen = dict.fromkeys(depths, layers) if not isinstance(layers, Mapping | None) else layers or {}
    for stack in chosen:
        if stack not in depths:
            raise unknown_name("stack of this model", stack, depths)
    kept = {stack: _kept(chosen[stack], depths[stack], layer_map) for stack in depths if stack in chosen}
    batches = check_calibration(anatomy, calibration)
    if hidden_size is not None:
        heads = heads_for(anatomy, hidden_size, heads)
    student = apply_plan(anatomy, PruningPlan(layers=kept, units=_units(anatomy, kept, heads, neurons, batches)))
    if hidden_size is not None:
        student = narrow(student, hidden_size, batches)
    everything = {stack: tuple(range(depth)) for stack, depth in depths.items()}
    block = replace(block_of(student.config), kept_layers=everything | kept)
    student.config.efficient = block.to_dict()
    return student


def _units(
    anatomy: Anatomy,
    kept: Mapping[str, tuple[int, ...]],
    heads: int | None,
    neurons: int | None,
    batches: Sequence[Batch],
) -> dict[str, tuple[int, ...]]:
    """The most important units of the groups of kept layers."""
    if heads is None and neurons is None:
        return {}
    groups = [g for g in anatomy.groups if g.stack not in kept or set(g.layers) & set(kept[g.stack])]
    groups = [g for g in groups if (neurons if g.is_neurons else heads) is not None]
    teacher, units = anatomy.model, {}
    importance = activation(teacher, groups, batches=batches) if batches else magnitude(teacher, groups)
    for group, scores in importance.items():
        name, count = ("neurons", neurons) if group.is_neurons else ("heads", heads)
        if count is None:
            continue
        if type(count) is not int or not 1 <= count <= group.units:
            raise ConfigError(f"{name}={count!r} must be from 1 to {group.units}, what {group.name} has.")
        units[group.name] = tuple(sorted(scores.topk(count).indices.tolist()))
    return units


def _kept(layers: Layers, depth: int, layer_map: str) -> tuple[int, ...]:
    if isinstance(layers, int) and not isinstance(layers, bool):
        return tuple(chosen_layers(layer_map, layers, depth))
    chosen = tuple(layers) if isinstance(layers, list | tuple) else ()
    is_rising = all(type(layer) is int for layer in chosen) and list(chosen) == sorted(set(chosen))
    if not chosen or not is_rising or not 0 <= chosen[0] <= chosen[-1] < depth:
        raise ConfigError(
            f"layers={layers!r} must be a number of layers from 1 to {depth}, or different layers from 0 to "
            f"{depth - 1} in rising order, such as [0, {depth - 1}]."
        )
    return chosen
