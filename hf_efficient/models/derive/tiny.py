"""A tiny model of the same architecture, made from any config by rule, and inputs for it.

    config = tiny_config(model.config)          # the same switches and patterns, small sizes
    model = tiny_model(config)                  # weights large enough that every mistake shows
    model(**tiny_inputs(model))

What is found and proven on the tiny model holds for the large one, because transformers builds both by the same code.
"""

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from ...errors import UnsupportedModelError

LAYERS, HEADS, KV_HEADS, HEAD_DIM, NEURONS, VOCABULARY, POSITIONS = 3, 4, 2, 8, 40, 120, 64
HIDDEN = HEADS * HEAD_DIM
ROWS, TOKENS, NEW_TOKENS = 2, 9, 6  # two lengths, so that cross attention is told from self-attention
MAX_PARAMETERS = 30_000_000

KV_FIELDS = r".*(num_key_value_heads?|kv_heads)|n_head_kv"
HEAD_FIELDS = r"n_heads?|num_heads?|.*attention_heads?|.*num_heads"
# The first pattern that fits the name of a field says its size; a value that is smaller stays.
SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*", VOCABULARY),
    (r"codebook_size", 64),
    (r"mamba_n_heads|mamba_num_heads|.*ssm.*heads", HEADS),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"conv_dim|num_conv_pos_embedding.*", HIDDEN),
    (r"(num_|n_)?(hidden_|encoder_|decoder_)?layers?|depth|num_blocks|.*_layers", LAYERS),
    (KV_FIELDS, KV_HEADS),
    (HEAD_FIELDS, HEADS),
    (r"rotary_dim", HEAD_DIM // 2),
    (r".*head_dim|.*head_size|d_kv|kv_channels|d_head", HEAD_DIM),
    (r".*lora_rank|.*_rank", 16),
    (r".*intermediate_size.*|.*ffn.*(dim|size)|d_ff|.*mlp_dim|dim_feedforward|.*inner_size|n_inner", NEURONS),
    (r".*hidden_size.*|d_model|dim|.*embed_dim|n_embd|.*_dim|.*embedding_size|.*(output|projection)_size", HIDDEN),
    (r"n_routed_experts|.*num_experts|num_local_experts", 4),
    (r"num_experts_per_tok|moe_topk|top_k_experts|.*experts_per_tok.*|n_group|topk_group|moe_k", 2),
    (r"mm_tokens_per_image", 4),
    (r".*(image_size|img_size)", 32),
    (r"patch_size", 8),
    (r"max_position_embeddings|max_source_positions|max_target_positions|n_positions|n_ctx", POSITIONS),
    (r"sliding_window|.*window_size|attention_chunk_size", 4),
)
KEPT = re.compile(
    r".*token.*id.*|num_channels|in_channels|.*_stride|.*kernel.*|temporal_patch_size|spatial_merge_size|.*rate.*"
    r"|num_labels|.*_layers_(enabled|idx)|num_feat_extract_layers|num_mel_bins"
)
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers")
# From the most plain class to those with heads: what a type has first is what is looked at.
CLASSES = (
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
)
NOT_FIELDS = ("stage_names", "out_features", "out_indices")  # made anew for another depth
NOT_FIELDS += ("model_type", "transformers_version", "architectures", "efficient", "auto_map", "_name_or_path")


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same architecture with small sizes: what is no size (switches, kinds of layers, activations) stays."""
    return type(config)(**_shrunk(config))


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_FIELDS}
    own = {name: value for name, value in vars(config).items() if not name.startswith("_") and name in fields}
    depth = next((own[name] for name in DEPTHS if isinstance(own.get(name), int)), None)
    for number, (name, value) in enumerate(own.items()):
        if isinstance(value, PreTrainedConfig):
            fields[name] = _shrunk(value) | {"model_type": value.model_type}
        elif isinstance(value, bool) or value is None:
            continue
        elif re.search(r"token_(id|index)$", name):
            fields[name] = min(value, VOCABULARY - 1 - number % 20) if isinstance(value, int) else value
        elif isinstance(value, int) and not KEPT.fullmatch(name):
            size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), value)
            fields[name] = size if re.fullmatch(KV_FIELDS, name) else min(value, size)  # one could not be cut
        elif name in ("image_size", "patch_size") and isinstance(value, list | tuple):
            fields[name] = [min(one, 32 if name == "image_size" else 8) for one in value]
        elif isinstance(value, list | tuple) and re.fullmatch("depths|num_heads|num_attention_heads", name):
            fields[name] = [2 if name == "depths" else HEADS] * len(value)  # of the stages of a hierarchical model
        elif isinstance(value, list | tuple) and depth and len(value) == depth > LAYERS:
            fields[name] = _few_entries(value)
        elif isinstance(value, dict) and name in ("rope_parameters", "rope_scaling"):
            fields[name] = _short_rope(copy.deepcopy(value))
    if "spatial_merge_size" in own and "window_size" in own:
        fields["window_size"] = own["spatial_merge_size"] * 2 * fields.get("patch_size", 8)
    if "depths" in own and isinstance(fields.get("image_size"), int):
        fields["image_size"] = min(own["image_size"], 128)  # windows in the last stage too
    text = fields.get("text_config") if "vision_config" in fields else None
    if text and "rope_type" in (
        text.get("rope_parameters") or {}
    ):  # some models have long sections where none are said
        text["rope_parameters"].setdefault("mrope_section", [2, 1, 1])
    heads = [name for name in fields if re.fullmatch(HEAD_FIELDS, name)]
    for name in fields:  # without grouped queries there, none here
        if re.fullmatch(KV_FIELDS, name) and any(own.get(name) == own.get(other) for other in heads):
            fields[name] = fields[heads[0]]
    return fields


def _few_entries(values: list | tuple) -> list:
    """One entry for each of the few layers; of unlike ones both kinds."""
    other = next((value for value in values if value != values[0]), values[0])
    return [values[0], other, values[-1]][:LAYERS]


def _short_rope(parameters: dict) -> dict:
    for section in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if "mrope_section" in section:
            section["mrope_section"] = [2, 1, 1]
        for name in ("short_factor", "long_factor"):
            if isinstance(section.get(name), list):
                section[name] = section[name][: HEAD_DIM // 2]
    return parameters


def model_classes(config: PreTrainedConfig) -> Iterator[type[PreTrainedModel]]:
    """The classes of transformers for a config, its plain model first; then what `AutoModel.register` was given."""
    seen = set()
    for table in CLASSES:
        names = getattr(modeling_auto, table, {}).get(config.model_type, ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in seen and (model_class := getattr(transformers, name, None)) is not None:
                seen.add(name)
                yield model_class
    if not seen:
        for auto in vars(modeling_auto).values():
            own = getattr(getattr(auto, "_model_mapping", None), "_extra_content", {}).get(type(config), ())
            yield from own if isinstance(own, tuple | list) else (own,)


def tiny_model(config: PreTrainedConfig, *model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A model of a tiny config, in eval mode and float32: of a given class, or the plainest that there is.

    Raises:
        UnsupportedModelError: no class of transformers builds it, or it is not tiny.
    """
    problem: object = "transformers has no model class for it"
    for one in model_class or model_classes(config):
        try:
            with torch.device("meta"), no_init_weights():
                count = sum(parameter.numel() for parameter in one(copy.deepcopy(config)).parameters())
            if count > MAX_PARAMETERS:
                problem = f"still {count:,} parameters"
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return _with_strong_weights(one(copy.deepcopy(config)).eval().float())
        except Exception as error:  # whatever the code of a model may raise
            problem = error
    raise UnsupportedModelError(f"No tiny {config.model_type} model could be built: {problem}")


@torch.no_grad()
def _with_strong_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Weights with which a wrong mask, head or neuron shows in the output; those of a new model are too small."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            inputs = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
            module.weight.normal_(0, 1 / math.sqrt(inputs), generator=generator)
            if module.bias is not None:
                module.bias.normal_(0, 0.1, generator=generator)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0, 1, generator=generator)
            if module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
        elif type(module).__name__.endswith("Experts"):
            for parameter in module.parameters(recurse=False):
                if parameter.ndim == 3:
                    parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]), generator=generator)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and re.search(r"(lambda|gamma|scale)[^.]*(\.weight)?$", name):
            parameter.fill_(0.7)  # layer scales of 1e-6 hide what a layer does, and of 1 that they are there
    model.tie_weights()
    for module in model.modules():
        if getattr(getattr(module, "config", None), "use_cache", False) is True:
            module.config.use_cache = False  # a layer runs again and again on the same tokens
    return model


def tiny_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs with which a tiny model runs: two texts, one of them padded, images, sounds; the most that it takes.

    Raises:
        UnsupportedModelError: it runs with none of them.
    """
    names = inspect.signature(model.forward).parameters
    made = {name: maker for name, maker in _MAKERS.items() if name in names}
    text = [name for name in made if name in ("input_ids", "attention_mask", "decoder_input_ids")]
    others = [name for name in made if name not in (*text, "hidden_states", "inputs_embeds")]
    main = [name for name in made if name in (model.main_input_name, "decoder_input_ids")]
    choices = ([*text, *others], [*others, *main], main, text, ["hidden_states"], ["inputs_embeds"])
    problem: object = None
    for names_tried in dict.fromkeys(map(tuple, choices)):
        if not names_tried or any(name not in made for name in names_tried):
            continue
        try:
            generator = torch.Generator().manual_seed(2)
            inputs = {name: made[name](model.config, generator) for name in dict.fromkeys(names_tried)}
            if "pixel_values" in inputs and "image_grid_thw" in names:
                inputs |= _patches(model.config, generator)
            if "pixel_values" in inputs and "input_ids" in inputs:
                _put_image_tokens(model, inputs)
            with torch.no_grad():
                model(**{name: value.clone() for name, value in inputs.items()})
            return inputs
        except Exception as error:  # whatever the code of a model may raise
            problem = problem or error
    reason = problem or f"it takes {', '.join(names)}"
    raise UnsupportedModelError(f"No inputs could be made for a tiny {type(model).__name__}: {reason}")


def _ids(config: PreTrainedConfig, generator: torch.Generator, length: int = TOKENS) -> Tensor:
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or VOCABULARY
    return torch.randint(3, min(vocabulary, 90), (ROWS, length), generator=generator)


def _padding(config: PreTrainedConfig, generator: torch.Generator) -> Tensor:
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[0, -3:] = 0
    return mask


def _pixels(config: PreTrainedConfig, generator: torch.Generator) -> Tensor:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 32)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.randn(ROWS, getattr(vision, "num_channels", 3), height, width, generator=generator)


def _features(config: PreTrainedConfig, generator: torch.Generator) -> Tensor:
    frames = 2 * config.max_source_positions if hasattr(config, "max_source_positions") else 64
    return torch.randn(ROWS, getattr(config, "num_mel_bins", 80), frames, generator=generator)


_MAKERS: dict[str, Callable[[PreTrainedConfig, torch.Generator], Tensor]] = {
    "input_ids": _ids,
    "attention_mask": _padding,
    "decoder_input_ids": lambda config, generator: _ids(config, generator, NEW_TOKENS),
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": lambda config, generator: torch.randn(ROWS, 6400, generator=generator),
    "hidden_states": lambda config, generator: torch.randn(ROWS, TOKENS, HIDDEN, generator=generator),
    "inputs_embeds": lambda config, generator: torch.randn(ROWS, TOKENS, HIDDEN, generator=generator),
}


def _patches(config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Images as Qwen's models and their kin read them: patches of all images one after another, and their grids."""
    vision = config.vision_config
    rows = columns = 2 * getattr(vision, "spatial_merge_size", 2)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
    numbers = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    return {
        "pixel_values": torch.randn(ROWS * rows * columns, numbers, generator=generator),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * ROWS),
    }


def _put_image_tokens(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """A model that reads images among its tokens wants as many image tokens as it makes of an image."""
    token = next((getattr(model.config, name, None) for name in ("image_token_id", "image_token_index")), None)
    if token is None or not hasattr(model, "get_image_features"):
        return
    images = {name: value for name, value in inputs.items() if name in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        try:
            features = model.get_image_features(**images)
        except ValueError:  # of Idefics and its kin a text may have several images: [rows, images, channels, ...]
            inputs["pixel_values"] = images["pixel_values"] = images["pixel_values"][:, None]
            features = model.get_image_features(**images)
    features = getattr(features, "pooler_output", features)
    parts = features if isinstance(features, list | tuple) else [features]
    count = sum(part.shape[:-1].numel() for part in parts) // ROWS
    tokens = torch.full((ROWS, count), token)
    inputs["input_ids"] = torch.cat([tokens, inputs["input_ids"]], 1)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.cat([torch.ones_like(tokens), inputs["attention_mask"]], 1)
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == token).long()
