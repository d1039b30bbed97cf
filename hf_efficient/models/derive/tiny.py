"""A tiny model of the same architecture, made from any config by rule.

    config = tiny_config(model.config)          # the same switches and patterns, small sizes
    model = tiny_model(config)                  # weights large enough that every mistake shows

What is found and proven on the tiny model holds for the large one, because transformers builds both by the same code.
"""

import copy
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from ...errors import UnsupportedModelError

LAYERS, HEADS, KV_HEADS, HEAD_DIM, NEURONS, VOCABULARY, POSITIONS = 3, 4, 2, 8, 40, 120, 64
HIDDEN = HEADS * HEAD_DIM
MAX_PARAMETERS = 30_000_000

KV_FIELDS = r".*(num_key_value_heads?|kv_heads)|n_head_kv"
HEAD_FIELDS = r"n_heads?|num_heads?|.*attention_heads?|.*num_heads"
# The first pattern that fits the name of a field says its size; a value that is smaller stays.
SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*", VOCABULARY),
    (r"codebook_size", 64),
    (r"mamba_n_heads|mamba_num_heads|.*ssm.*heads", HEADS),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r".*bottleneck_size", HIDDEN),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"conv_dim|num_conv_pos_embedding.*", HIDDEN),
    (r"(num_|n_)?(hidden_|encoder_|decoder_)?layers?|depth|num_blocks|.*_layers", LAYERS),
    (KV_FIELDS, KV_HEADS),
    (HEAD_FIELDS, HEADS),
    (r"rotary_dim", HEAD_DIM // 2),
    (r".*head_dim|.*head_size|d_kv|kv_channels|d_head|dim_head", HEAD_DIM),
    (r".*lora_rank|.*_rank", 16),
    (r".*intermediate_size.*|.*ffn.*(dim|size)|d_ff|dim_ff|.*mlp_dim|dim_feedforward|.*inner_size|n_inner", NEURONS),
    (r".*hidden_size.*|d_model|dim|.*embed_dim|n_embd|.*_dim|.*embedding_size|.*(output|projection)_size", HIDDEN),
    (r"n_routed_experts|.*num_experts|num_local_experts", 4),
    (r"num_experts_per_tok|moe_topk|top_k_experts|.*experts_per_tok.*|n_group|topk_group|moe_k", 2),
    (r"mm_tokens_per_image", 4),
    (r".*(image_size|img_size)", 32),
    (r"patch_size", 8),
    (r"max_position_embeddings|max_source_positions|max_target_positions|n_positions|n_ctx", POSITIONS),
    (
        r"sliding_window|attention_window_size",
        4 * POSITIONS,
    ),  # in a converted layer the new attention takes the place of such a window
    (r".*window_size|attention_chunk_size", 4),
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
        elif name == "vocab_size" and value is None:
            fields[name] = VOCABULARY
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
    if "rope_type" in (fields.get("rope_parameters") or {}):  # some have long sections where none are said
        fields["rope_parameters"].setdefault("mrope_section", [2, 1, 1])
    for name, value in fields.items():
        if isinstance(value, dict) and value and all(str(key).isdigit() for key in value):  # by layer
            fields[name] = {key: one for key, one in value.items() if int(key) < LAYERS}
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
        elif parameter.ndim == 2 and not parameter.any():  # a matrix of zeros hides what it is multiplied with
            parameter.normal_(0, 1 / math.sqrt(parameter.shape[0]), generator=generator)
    model.tie_weights()
    for module in model.modules():
        if getattr(getattr(module, "config", None), "use_cache", False) is True:
            module.config.use_cache = False  # a layer runs again and again on the same tokens
    return model
