"""Which layers of a config the few layers of its tiny model are like: together of as many kinds as can be.

sources_of({"num_hidden_layers": 32, "layer_types": [...]}, "each")      # [0, 3, 31]
"""

import re
from itertools import combinations
from typing import Any

LAYERS = 3
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers")
# Lists of the numbers of those layers that are of one kind.
NUMBER_LISTS = r"(cross_attention|mlp_only|moe)_layers|attn_layer_indices|hybrid_layer_ids"


def sources_of(own: dict[str, Any], way: str) -> list[int]:
    """Which layers the few layers are like: of unlike ones both kinds; [] where no field says how many there are."""
    depth = next((own[name] for name in DEPTHS if isinstance(own.get(name), int)), 0)
    if depth <= LAYERS or "depths" in own:  # there the number of layers is one of stages
        return []
    if way == "first":
        return list(range(LAYERS))

    def kind(layer: int) -> list:
        lists = [value[layer] for value in own.values() if isinstance(value, list | tuple) and len(value) == depth]
        return (
            lists
            + [value.get(layer, value.get(str(layer))) for value in own.values() if is_by_layer(value, depth)]
            + [layer in value for name, value in own.items() if numbers_layers(name, value, depth)]
        )

    def variety(layers: list[int]) -> int:
        return sum(len({str(one) for one in entry}) for entry in zip(*map(kind, layers), strict=True))

    unlike = [layer for layer in range(depth) if kind(layer) != kind(0)] or [1]
    others = [layer for layer in unlike if kind(layer) == kind(unlike[0])]
    usual = [0, others[0], others[-1] if way == "second" else depth - 1]
    # of each list as many kinds as three layers can be of: full attention may come after dense and sparse FFNs
    kinds = {str(kind(layer)): layer for layer in reversed(range(depth))}
    chosen = max((usual, *([0, *sorted(pair)] for pair in combinations(kinds.values(), 2))), key=variety)
    return chosen if way == "each" else usual


def numbers_layers(name: str, value: Any, depth: int) -> bool:
    """Whether a list says which layers are of some kind by their numbers."""
    is_list = isinstance(value, list | tuple) and 0 < len(value) <= depth and all(type(one) is int for one in value)
    return is_list and bool(re.fullmatch(NUMBER_LISTS, name)) and max(value) < depth


def is_by_layer(value: Any, depth: int) -> bool:
    numbers = list(value) if isinstance(value, dict) else []
    is_label = any(isinstance(one, str) for one in value.values()) if numbers else False
    return bool(numbers) and not is_label and all(str(key).isdigit() and int(key) < depth for key in numbers)
