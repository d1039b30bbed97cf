"""Small numbers for a config of any architecture, by rules about the names and the values of its fields.

    fields = shrunk(config, WAYS[0])      # of the same class: type(config)(**fields)

Numbers of a config depend on each other, and no rule knows how. So there is more than one way: first each number gets
the size of its kind; else all widths are divided by one factor, the numbers of heads by a second and the widths of a
head by a third, and equations of sums and products stay true; else fewer kinds are made small.
"""

import copy
import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from .layers import DEPTHS, LAYERS, is_by_layer, numbers_layers, sources_of

HEADS, KV_HEADS, HEAD_DIM, NEURONS, VOCABULARY, POSITIONS = 4, 2, 8, 40, 120, 64
HIDDEN, IMAGE, PATCH = HEADS * HEAD_DIM, 32, 8

KV_FIELDS = r".*(num_key_value_heads?|kv_heads)|n_head_kv"
HEAD_FIELDS = r"n_heads?|num_heads?|.*attention_heads?|.*num_heads"
# The first pattern that fits the name of a field says its kind and size; a value that is smaller stays.
KINDS: tuple[tuple[str, str, int], ...] = (
    (r".*vocab_size.*|.*_vocab|num_bins", "vocabulary", VOCABULARY),
    (r"codebook_size|num_embeddings", "vocabulary", 64),
    (r"mamba_n_heads|mamba_num_heads|.*ssm.*heads", "heads", HEADS),
    (r"qk_head_dim", "dim", 2 * HEAD_DIM),
    (r".*bottleneck_size", "width", HIDDEN),
    (r"first_k_dense_replace|num_dense_layers|num_kv_shared_layers|attn_layer_offset", "layers", 1),
    (r"attn_layer_period", "layers", 2),  # Jamba
    (r"conv_dim|num_conv_pos_embedding.*", "width", HIDDEN),
    (
        r"(num_|n_)?(hidden_|encoder_|decoder_)?layers?|depth|num_blocks|.*_layers|num_self_.*per_block",
        "layers",
        LAYERS,
    ),
    (KV_FIELDS, "kv", KV_HEADS),
    (HEAD_FIELDS, "heads", HEADS),
    (r"rotary_dim", "dim", HEAD_DIM // 2),
    (r".*head_dim|.*head_size|d_kv|kv_channels|d_head|dim_head|.*_d_head", "dim", HEAD_DIM),
    (r".*lora_rank|.*_rank", "rank", 16),
    (
        r".*intermediate_size.*|.*ffn.*(dim|size)|d_ff|dim_ff|.*mlp_dim|dim_feedforward|.*inner_size|n_inner",
        "neurons",
        NEURONS,
    ),
    (r".*hidden_size.*|d_model|dim|.*embed_dim|n_embd|.*_dim|.*embedding_size", "width", HIDDEN),
    (
        r".*(output|projection)_size|.*mamba_d_ssm|d_latents|base_channels|output_channels",
        "width",
        HIDDEN,
    ),
    (r"num_pos_feats", "width", HIDDEN // 2),
    (r"coordinate_size", "width", HIDDEN // 8),  # four of these and two of those make a hidden width
    (r"shape_size", "width", HIDDEN // 4),
    (r"(mamba_)?n_groups", "groups", 2),
    (r"n_filters|num_filters", "filters", 8),
    (r"n_routed_experts|.*num_experts|num_local_experts", "experts", 6),  # of two groups, each may lose one of three
    (
        r"num_experts_per_tok|moe_topk|top_k_experts|.*experts_per_tok.*|n_group|num_expert_group|topk_group|moe_k",
        "experts",
        2,
    ),
    (r"(.*_)?num_queries|num_latents|latent_query_num|two_stage_num_proposals", "queries", 6),
    (r"mm_tokens_per_image|.*prompt_size", "image", 4),
    (r".*(image_size|img_size)|crop_size", "image", IMAGE),
    (r"patch_size", "patch", PATCH),
    (r"max_position_embeddings|max_source_positions|max_target_positions|n_positions|n_ctx", "positions", POSITIONS),
    (
        r"sliding_window(_size)?|attention_window_size",
        "view",
        16 * POSITIONS,
    ),  # a converted layer has its new attention in place of such a window, which hides nothing from as many tokens
    (r"n_window_infer", "window", 100),
    (r"n_window", "window", 50),  # of which Qwen 3's code knows that it makes 13 tokens
    (r"((mamba|ssm)_)?chunk_size", "window", 8),  # to a multiple of which states are padded: 256 take a second each
    (r".*window_size|attention_chunk_size|context_size", "window", 4),
)
KEPT = re.compile(
    r".*token.*id.*|num_channels|in_channels|.*_stride|.*kernel.*|temporal_patch_size|spatial_merge_size|.*rate.*"
    r"|num_labels|.*_layers_(enabled|idx)|num_feat_extract_layers|num_mel_bins"
)
# In a list: of stages, and of layers by their numbers.
WIDTH_LISTS = r"hidden_sizes?|.*_sizes|.*dims?|.*channels|.*_features|.*(dim|channel)_list|.*dim_per_stage"
INDEX_LISTS = r".*(feature_layers?|indexes|indices|index_list)"
NOT_FIELDS = ("stage_names", "out_features", "out_indices")  # made anew for another depth
NOT_FIELDS += ("model_type", "transformers_version", "architectures", "efficient", "auto_map", "_name_or_path")


@dataclass(frozen=True)
class Way:
    """How numbers become small: each to the size of its kind, widths times `wide`, or divided by common factors.

    `kept` kinds and fields stay. Of per-layer lists there remain one entry of "each" kind, the "first" ones, or twice
    the "second" kind. With `narrow_lists` the widths of stages too are divided by one factor. `as_it_is` is for
    configs that are small already.
    """

    in_proportion: bool = False
    wide: int = 1
    kept: tuple[str, ...] = ()
    layers: str = "each"
    as_it_is: bool = False
    narrow_lists: bool = False
    filled: tuple[str, ...] = ()  # fields that say nothing, where a number must be said: `Config.field` if it has none


PLACES = ("positions", "window", "queries", "patch")
WAYS = (
    Way(),
    Way(in_proportion=True),
    Way(layers="first"),
    Way(layers="second"),
    Way(wide=4),
    Way(kept=PLACES),
    Way(in_proportion=True, kept=PLACES),
    Way(in_proportion=True, layers="second"),
    Way(kept=("width", "dim", "heads", "kv", "filters", "rank", *PLACES)),
    Way(narrow_lists=True),
    Way(as_it_is=True),
)


def kind_of(name: str) -> tuple[str, int]:
    """The kind and the size of a field by its name; ("", 0) for what is no size."""
    if KEPT.fullmatch(name):
        return "", 0
    return next(((kind, size) for pattern, kind, size in KINDS if re.fullmatch(pattern, name)), ("", 0))


def shrunk(config: PreTrainedConfig, way: Way) -> dict[str, Any]:
    """The fields of a config with small numbers; what is no size (switches, kinds of layers, activations) stays."""
    return _shrunk(config, way, _factors(config) if way.in_proportion else {})


def all_fields(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    """The names and values of a config's fields, and of those of the configs inside it."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from all_fields(value)
        elif not name.startswith("_"):
            yield name, value


def _factors(config: PreTrainedConfig) -> dict[str, int]:
    """By what numbers of heads, widths of a head and all other widths are divided, in the whole of a config."""
    found: dict[str, set[int]] = {"heads": set(), "kv": set(), "dim": set(), "width": set()}
    for name, value in all_fields(config):
        kind = kind_of(name)[0]
        for one in value if isinstance(value, list | tuple) else [value]:
            if kind in found and isinstance(one, int) and not isinstance(one, bool) and one > 1:
                found[kind].add(one)
    heads, kv_heads, widths = found["heads"], found["kv"], found["width"]
    dims = found["dim"] | {width // max(heads) for width in widths if heads and width % max(heads) == 0}
    few, narrow = 1, 1
    while not any(one % (2 * few) for one in heads | kv_heads) and heads:
        if min(heads) // few < 2 * HEADS or (kv_heads and min(kv_heads) // few < 2 * KV_HEADS):
            break
        few *= 2
    while dims and not any(one % (2 * narrow) for one in dims) and min(dims) // narrow >= 2 * HEAD_DIM:
        narrow *= 2
    return {"heads": few, "kv": few, "dim": narrow, "width": few * narrow, "neurons": few * narrow}


def _shrunk(config: PreTrainedConfig, way: Way, factors: dict[str, int]) -> dict[str, Any]:
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_FIELDS}
    own = {name: value for name, value in vars(config).items() if not name.startswith("_") and name in fields}
    for name in _computed(config, own):
        own.pop(name), fields.pop(name)
    own |= {name: value for name, value in fields.items() if name not in own and isinstance(value, dict)}
    if "out_features" in vars(config) and all(isinstance(one, int) for one in config.out_features or [""]):
        own["out_features"] = list(config.out_features)  # widths, elsewhere names of stages
    sources = sources_of(own, way.layers)
    depth = next((own[name] for name in DEPTHS if sources and isinstance(own.get(name), int)), 0)
    widths = {value for name, value in own.items() if isinstance(value, int) and kind_of(name)[0] == "width"}
    for number, (name, value) in enumerate(own.items()):
        if isinstance(value, PreTrainedConfig):
            fields[name] = _shrunk(value, way, factors) | {"model_type": value.model_type}
        elif name in way.kept or isinstance(value, bool) or (name in DEPTHS and "depths" in own):
            fields[name] = value
        elif re.search(r"token_(id|index)$|image_patch_id$", name):
            fields[name] = _token(name, value, number)
        elif name == "input_size" and "patch_size" in own and isinstance(value, int):
            fields[name] = value if "image" in way.kept else min(value, IMAGE)
        elif isinstance(value, int):
            same = widths and value in widths and value >= POSITIONS  # groups as many as channels
            fields[name] = _number(name, value, way, factors, bool(same))
        elif value is None:
            fields[name] = VOCABULARY if name == "vocab_size" else _filling(name) if name in way.filled else None
        elif sources and numbers_layers(name, value, depth):
            fields[name] = [new for new, old in enumerate(sources) if old in value]
        elif isinstance(value, list | tuple) and sources and len(value) == depth:
            entries = [value[layer] for layer in sources]
            one = name.removesuffix("_per_layer")
            is_size = len(set(value)) == 1 and type(value[0]) is int
            fields[name] = [_number(one, n, way, factors, False) for n in entries] if is_size else entries
        elif isinstance(value, dict) and re.fullmatch(".*patch.*_dict", name) and "image" not in way.kept:
            fields[name] = {(IMAGE * way.wide // PATCH) ** 2: 6}  # numbers of patches and what is made of them
        elif is_by_layer(value, depth):
            by_layer = {int(key): _small_entry(one, way, factors) for key, one in value.items()}
            fields[name] = {new: by_layer[old] for new, old in enumerate(sources) if old in by_layer}
        elif isinstance(value, list | tuple):
            fields[name] = _list(name, list(value), way, factors, widths)
        elif isinstance(value, dict) and name in ("rope_parameters", "rope_scaling"):
            fields[name] = _short_rope(copy.deepcopy(value), own, factors.get("dim", 0), way)
    missing = (name for kind, _, name in (one.partition(".") for one in way.filled) if kind == type(config).__name__)
    fields |= {name: 0 if "dropout" in name else _filling(name) for name in missing}
    fields |= _outputs(config, fields, own)
    return _consistent(fields, own, way)


def _small_entry(entry: Any, way: Way, factors: dict[str, int]) -> Any:
    """What a dict says of one layer: fields like those of the config."""
    if not isinstance(entry, dict):
        return entry
    numbers = {name: one for name, one in entry.items() if isinstance(one, int) and not isinstance(one, bool)}
    return entry | {name: _number(name, one, way, factors, False) for name, one in numbers.items()}


def _number(name: str, value: int, way: Way, factors: dict[str, int], is_width: bool) -> int:
    kind, size = kind_of(name)
    if not kind and is_width and not KEPT.fullmatch(name):
        kind, size = "width", HIDDEN
    if not kind or kind in way.kept:
        return value
    if kind in factors:
        return max(1, value // factors[kind]) if value > 1 else value
    if kind in ("width", "dim", "neurons") or name.endswith(("image_size", "img_size")):
        size *= way.wide
    return size if kind in ("kv", "view") and value > 0 else min(value, size)  # one key/value head could not be cut


def _filling(name: str) -> int:
    """A number for a field that says none; of lengths two, so that cross attention is told from others."""
    return {"dim": HEAD_DIM, "neurons": NEURONS}.get(kind_of(name)[0], 6 if "prediction" in name else 4)


def _token(name: str, value: Any, number: int) -> Any:
    """Inside of the small vocabulary; a place for images that has no number yet gets one."""
    if value is None and re.search("image|audio|video", name):
        value = VOCABULARY
    return min(value, VOCABULARY - 1 - number % 20) if isinstance(value, int) else value


def _list(name: str, values: list, way: Way, factors: dict[str, int], widths: set[int]) -> list:
    """Of numbers of stages, or of both sides of an image or of several."""
    if values and name.endswith("grid_pinpoints") and "image" not in way.kept:
        least = min(side for sides in values for side in sides)  # for real images of one tile, or for two
        return [[IMAGE * way.wide * side // least for side in sides] for sides in values]
    if not values or name in way.kept or not all(isinstance(one, int) and not isinstance(one, bool) for one in values):
        return values
    kind = kind_of(name)[0]
    if kind in way.kept:
        return values
    if name in ("image_size", "patch_size", "tubelet_size"):
        return [min(one, IMAGE if name == "image_size" else PATCH) for one in values]
    if name == "depths":
        return [min(2, one) for one in values]
    if re.fullmatch("num_heads|num_attention_heads", name):
        return [max(1, one // factors["heads"]) if factors else HEADS for one in values]
    if re.fullmatch(INDEX_LISTS, name) and max(values) >= LAYERS:
        return [min(number, LAYERS - 1) for number in range(len(values))]
    is_width = kind == "width" or re.fullmatch(WIDTH_LISTS, name)
    if is_width and way.narrow_lists and all(one % min(values) == 0 and one >= HIDDEN for one in values):
        return [one // min(values) * HIDDEN for one in values]
    if not factors and is_width and min(values) >= POSITIONS and "width" not in way.kept:
        return [min(one, HIDDEN * way.wide) if one in widths else one for one in values]
    return (
        [one // factors["width"] for one in values]
        if factors and is_width and min(values) >= factors["width"]
        else values
    )


def _computed(config: PreTrainedConfig, own: dict[str, Any]) -> list[str]:
    """Numbers that a config of transformers makes of others, and makes anew; not its lists of layers."""
    if not type(config).__module__.startswith("transformers."):
        return []
    said = {*inspect.signature(type(config)).parameters, *config.attribute_map, *config.attribute_map.values()}
    depth = next((own[name] for name in DEPTHS if isinstance(own.get(name), int)), 0)
    numbers = {name: value for name, value in own.items() if isinstance(value, int | float | list | tuple)}
    lists = {name for name, value in numbers.items() if isinstance(value, list | tuple) and len(value) == depth}
    return [name for name in numbers if name not in said and name not in lists]


def _outputs(config: PreTrainedConfig, fields: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Which stages a backbone gives: as many as before, the last ones where there are fewer."""
    stages, given = getattr(config, "stage_names", None), getattr(config, "out_indices", None)
    if not stages or not given or list(given) == [len(stages) - 1]:
        return {}
    count = len(stages)
    depth = next((own[name] for name in DEPTHS if isinstance(own.get(name), int)), None)
    if "depths" not in own and depth == count - 1:
        count = min(count, LAYERS + 1)
    given = given if count == len(stages) else range(max(0, count - len(given)), count)
    return {"out_indices": [int(one) for one in given], "out_features": None}


def _short_rope(parameters: dict, own: dict[str, Any], factor: int, way: Way) -> dict:
    for section in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if section.get("rope_theta", 0) is None:
            section["rope_theta"] = 10_000.0
        if section.get("mrope_section"):
            parts = section["mrope_section"]
            exact = factor and all(one % factor == 0 for one in parts)
            section["mrope_section"] = [one // factor for one in parts] if exact else _sections(parts, own, way)
        for name in ("short_factor", "long_factor"):
            if isinstance(section.get(name), list):
                section[name] = section[name][: HEAD_DIM // 2 if not factor else len(section[name]) // factor]
    return parameters


def _sections(parts: list[int], own: dict[str, Any], way: Way) -> list[int]:
    """As many frequencies as a small head rotates, in about the same parts; what is left over gets the unlike one."""
    rotated = (own.get("rope_parameters") or {}).get("partial_rotary_factor") or own.get("partial_rotary_factor") or 1
    half = int(HEAD_DIM * way.wide * rotated) // 2
    small = [one * half // sum(parts) for one in parts]
    unlike = next((place for place, one in enumerate(parts) if parts.count(one) == 1), 0)
    small[unlike] += half - sum(small)
    return small


def _consistent(fields: dict[str, Any], own: dict[str, Any], way: Way) -> dict[str, Any]:
    """Fields that hang together."""
    if "spatial_merge_size" in own and "window_size" in own and "window" not in way.kept:
        patch = fields.get("patch_size", PATCH)
        fields["window_size"] = own["spatial_merge_size"] * 2 * (patch if isinstance(patch, int) else patch[0])
    if "downsample_rate" in own and isinstance(own.get("window_size"), int):
        fields["window_size"] = own["window_size"] // own["downsample_rate"] * own["downsample_rate"]
    if isinstance(own.get("pixel_shuffle_ratio"), float) and not way.in_proportion:  # its projector reads patches
        fields["intermediate_size"] = int(fields["hidden_size"] / own["pixel_shuffle_ratio"] ** 2)
    if "depths" in own and isinstance(fields.get("image_size"), int):
        fields["image_size"] = min(own["image_size"], 128)  # windows in the last stage too
    if not way.in_proportion and "rope_type" in (fields.get("rope_parameters") or {}):
        # some have long sections where none are said
        fields["rope_parameters"].setdefault("mrope_section", _sections([1, 1, 2], own, way))
    if any(kind_of(name)[0] == "experts" and isinstance(value, int) for name, value in own.items()):
        for name in own:  # of experts that there are some must be chosen
            if fields[name] is None and re.fullmatch(r".*experts_per_tok.*|moe_topk|top_k_experts", name):
                fields[name] = 2
    for name, value in own.items():  # maps of features are as large as the image
        if name.endswith("feature_sizes") and isinstance(value, list | tuple) and value:
            side = 4 * IMAGE * way.wide // PATCH
            fields[name] = [[side // 2**level] * len(one) for level, one in enumerate(value)]
    parts = [(value, fields[name]) for name, value in own.items() if isinstance(value, PreTrainedConfig)]
    for part, small in parts:  # an image is cut into patches that are the images of a tower (Depth Pro)
        if isinstance(own.get("patch_size"), int) and own["patch_size"] == getattr(part, "image_size", None):
            fields["patch_size"] = small["image_size"] = (
                IMAGE * way.wide if "image" not in way.kept else own["patch_size"]
            )
    for part, small in parts:  # what is given is made of several tokens, or of several layers
        width = getattr(part, "hidden_size", None)
        for name in own if isinstance(width, int) and "hidden_size" in small and not way.in_proportion else ():
            if re.fullmatch("out_hidden_size|.*output_dim", name) and isinstance(own[name], int) and own[name] > width:
                fields[name] = own[name] // width * small["hidden_size"] if own[name] % width == 0 else fields[name]
    if own.get("context_length", 0) is None and fields.get("prediction_length"):
        fields["context_length"] = 4  # else it is that of the prediction
    if own.get("num_position_embeddings") == _patches(own):  # one for each patch
        fields["num_position_embeddings"] = _patches(fields)
    heads = [name for name in fields if re.fullmatch(HEAD_FIELDS, name)]
    for name in fields:  # without grouped queries there, none here
        if re.fullmatch(KV_FIELDS, name) and any(own.get(name) == own.get(other) for other in heads):
            fields[name] = fields[heads[0]]
    return fields


def _patches(fields: dict[str, Any]) -> int | None:
    """How many patches an image has, where fields say it."""
    image, patch = fields.get("image_size"), fields.get("patch_size")
    sides = image if isinstance(image, list | tuple) else [image, image]
    return math.prod(side // patch for side in sides) if image and isinstance(patch, int) else None
