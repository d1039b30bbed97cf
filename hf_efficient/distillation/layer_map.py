"""Which teacher layer each student layer learns from.

A map is a list of pairs (student, teacher) of positions in `hidden_states`: 0 is the embeddings, l the output of layer
l. With N teacher layers and M student layers:

    uniform   (m, m N / M) rounded, and (0, 0)              TinyBERT, Jiao et al. 2020
    last      (m, N - M + m)                                the upper layers, PKD-last, Sun et al. 2019
    linspace  M layers from the first to the last one       distil-whisper, Gandhi et al. 2023
    auto      the layers that the student kept of its teacher, where its config remembers them, else uniform

    layer_pairs("uniform", 3, 12)      # [(0, 0), (1, 4), (2, 8), (3, 12)]
    layer_pairs([[1, 2], [2, 6]], 2, 6)

`chosen_layers` answers the same question for building a student: which layers of the teacher to copy.
In models that normalise before each sublayer (Llama, T5, ViT), `hidden_states[-1]` of many classes is taken after the
final norm: a map that pairs the student's last layer with an inner teacher layer compares across that norm.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..errors import ConfigError, UnsupportedModelError, unknown_name
from ..models.registry import text_config
from ..training.batch import base_of
from .options import MAPS

Pairs = list[tuple[int, int]]
LayerMap = str | Sequence[Sequence[int]] | dict[str, Any]


def chosen_layers(name: str, student_layers: int, teacher_layers: int) -> list[int]:
    """The teacher layers (from 0) that a student of `student_layers` layers copies or follows."""
    n, m = teacher_layers, student_layers
    if not 1 <= m <= n:
        raise ConfigError(
            f"A student of {m} layers cannot follow a teacher of {n} layers one by one; allowed: 1 to {n}. "
            "Give layer_map as a list of (student, teacher) pairs."
        )
    if name == "uniform":
        return [(2 * k * n + m) // (2 * m) - 1 for k in range(1, m + 1)]  # round(k n / m), halves upwards
    if name == "last":
        return list(range(n - m, n))
    if name == "linspace":
        return [round(k * (n - 1) / (m - 1)) for k in range(m)] if m > 1 else [n - 1]
    raise unknown_name("layer_map", name, MAPS)


def layer_pairs(
    layer_map: str | Sequence[Sequence[int]],
    student_layers: int,
    teacher_layers: int,
    kept: Sequence[int] | None = None,
) -> Pairs:
    """The pairs of one stack; ConfigError for an unknown name, a list of no pairs, or a position beyond a depth."""
    if not isinstance(layer_map, str):
        return _check_pairs(layer_map, student_layers, teacher_layers)
    if layer_map == "auto" and has_gaps(kept, student_layers, teacher_layers):
        return [(0, 0), *((layer + 1, layer + 1) for layer in kept or ())]
    if layer_map == "auto" and kept is not None:
        if len(kept) != student_layers or max(kept) >= teacher_layers:
            raise ConfigError(
                f"The student's config says that it kept the layers {list(kept)}, which does not fit a student of "
                f"{student_layers} and a teacher of {teacher_layers} layers. Is this the model it was cut from? "
                "If not, choose layer_map='uniform'."
            )
        chosen = list(kept)
    else:
        layer_map = "uniform" if layer_map == "auto" else layer_map
        chosen = chosen_layers(layer_map, student_layers, teacher_layers)
    embeddings = [(0, 0)] if layer_map in ("auto", "uniform") else []
    return embeddings + [(m + 1, layer + 1) for m, layer in enumerate(chosen)]


def has_gaps(kept: Sequence[int] | None, student_layers: int, teacher_layers: int) -> bool:
    """Layers have left the student, and the others are where they were (`models.gaps`)."""
    return kept is not None and len(kept) < student_layers == teacher_layers and max(kept) < teacher_layers


def map_layers(
    student: nn.Module, teacher: nn.Module, layer_map: LayerMap, stacks: tuple[str, ...]
) -> dict[str, Pairs]:
    """The pairs of every stack of these two models; ConfigError if the map does not fit them."""
    student_depths, teacher_depths = depths(student, stacks), depths(teacher, stacks)
    kept = kept_layers(student, stacks)
    if isinstance(layer_map, dict) and set(layer_map) != set(stacks):
        raise ConfigError(f"The layer map has the keys {sorted(layer_map)}; this model's stacks are {sorted(stacks)}.")
    pairs = {}
    for stack in stacks:
        spec = layer_map[stack] if isinstance(layer_map, dict) else layer_map
        pairs[stack] = layer_pairs(spec, student_depths[stack], teacher_depths[stack], kept.get(stack))
    return pairs


def map_attentions(
    student: nn.Module, teacher: nn.Module, layer_map: LayerMap | None, stacks: tuple[str, ...]
) -> dict[str, Pairs]:
    """As `map_layers`, for what only layers have: no embeddings, nor a stack of nothing else. `None` pairs the last
    layers alone.

    Raises:
        UnsupportedModelError: layers have left gaps in the student, which give no attention.
    """
    ends, kept = (depths(student, stacks), depths(teacher, stacks)), kept_layers(student, stacks)
    for stack in stacks:
        if has_gaps(kept.get(stack), ends[0][stack], ends[1][stack]):
            raise UnsupportedModelError(
                f"Layers that left the student's {stack} have gaps in their places, so that attention cannot be "
                "compared layer by layer. Take losses of hidden states or of the output alone."
            )
    if layer_map is None:
        return {stack: [(ends[0][stack], ends[1][stack])] for stack in stacks}
    whole = map_layers(student, teacher, layer_map, stacks)
    pairs = {stack: [pair for pair in own if min(pair) > 0] for stack, own in whole.items()}
    for stack, own in pairs.items():
        if not own:
            raise ConfigError(
                f"The layer map {layer_map!r} compares no two layers of the {stack}: 0 is the embeddings, which "
                "have no attention. Give pairs from 1 up."
            )
    return pairs


def _check_pairs(pairs: Sequence[Sequence[int]], student_layers: int, teacher_layers: int) -> Pairs:
    is_list = isinstance(pairs, list | tuple) and len(pairs) > 0
    if not is_list or not all(isinstance(p, list | tuple) and [type(i) for i in p] == [int, int] for p in pairs):
        raise ConfigError(
            f"layer_map={pairs!r} must be a name ({', '.join(MAPS)}) or a list of pairs of integers such as "
            "[[1, 2], [2, 4]] (student, teacher; 0 is the embeddings)."
        )
    for student, teacher in pairs:
        for whose, position, layers in (("student", student, student_layers), ("teacher", teacher, teacher_layers)):
            if not 0 <= position <= layers:
                raise ConfigError(
                    f"layer_map pair ({student}, {teacher}): the {whose} has the positions 0 (embeddings) to {layers}."
                )
    return [(student, teacher) for student, teacher in pairs]


def depths(model: nn.Module, stacks: tuple[str, ...]) -> dict[str, int]:
    """The number of layers in each stack."""
    config = text_config(base_of(model).config)
    fields = {"encoder": "num_hidden_layers", "decoder": "decoder_layers"}
    if "decoder" in stacks and config.to_dict().get("num_decoder_layers") is not None:
        fields["decoder"] = "num_decoder_layers"
    return {stack: _integer(config, fields[stack]) for stack in stacks}


def width(model: nn.Module) -> int:
    """The size of the hidden states."""
    return _integer(text_config(base_of(model).config), "hidden_size")


def kept_layers(model: nn.Module, stacks: tuple[str, ...]) -> dict[str, list[int]]:
    """The layers of the original that a cut student still has, from `config.efficient["kept_layers"]`."""
    block: dict[str, Any] = getattr(base_of(model).config, "efficient", None) or {}
    kept: dict[str, list[int]] = block.get("kept_layers") or {}
    if len(stacks) == 1:  # the table of families calls the only stack of a causal model its decoder
        return dict(zip(stacks, kept.values(), strict=False))
    return kept


def _integer(config: PreTrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int):
        raise UnsupportedModelError(
            f"Losses that compare layers need one {name} in the config; a {config.model_type!r} config has {value!r}. "
            "Leave them out of losses."
        )
    return value
