"""Which field of a config says a size: by names that models have for it, and by the size itself.

find_field(BertConfig(), "neurons", 3072)        # "intermediate_size"
"""

import re
from collections.abc import Iterator
from dataclasses import replace

from transformers import PreTrainedConfig

from ..family import FFN

# The standard name of each size, then other names that models have for it.
FIELDS = {
    "heads": "num_attention_heads num_heads n_head n_heads attention_heads encoder_attention_heads "
    "decoder_attention_heads",
    "kv_heads": "num_key_value_heads num_kv_heads n_head_kv kv_heads",
    "layers": "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers depth layers inner_group_num",
    "hidden": "hidden_size d_model dim n_embd embed_dim hidden_dim encoder_hidden_size decoder_hidden_size",
    "neurons": "intermediate_size ffn_dim d_ff dim_ff encoder_ffn_dim decoder_ffn_dim hidden_dim n_inner "
    "ffn_hidden_size mlp_dim inner_dim dim_feedforward encoder_intermediate_size",
    "expert_neurons": "moe_intermediate_size expert_ffn_hidden_size intermediate_size ffn_dim d_ff expert_dim",
    "shared_neurons": "shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp",
    "experts": "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts",
    "expert_groups": "n_group num_expert_group n_expert_groups",
    "active_groups": "topk_group num_limited_groups topk_groups",
    "experts_per_token": "num_experts_per_tok num_experts_per_token top_k_experts moe_topk moe_k top_k",
    "head_dim": "head_dim d_kv attention_head_dim kv_channels",
}
# Lists of a config with an entry for each stage of a hierarchical model.
LISTS = {
    "layers": "depths?|num_encoder_blocks|blocks_per_stage",
    "hidden": "hidden_sizes|embed_dims?|dims|depths_dims",
    "heads": "(num|encoder_num|stage_num)_(attention_)?heads|num_attention_heads(_per_stage)?",
}


def of_stage(path: str, config: PreTrainedConfig) -> dict[str, list[str]]:
    """The entries of lists of a config that speak of one stage of several: `depths.1` for `layers.1.blocks`."""
    numbers = [part for part in path.split(".") if part.isdigit()]
    return {role: [f"{name}.{numbers[0]}" for name in lists_of(config, role) if numbers] for role in LISTS}


def lists_of(config: PreTrainedConfig, role: str) -> list[str]:
    lists = (name for name, value in vars(config).items() if isinstance(value, list | tuple))
    return [name for name in lists if re.fullmatch(LISTS[role], name)]


def nested_configs(config: PreTrainedConfig, path: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig) and not name.startswith("_"):
            yield from nested_configs(value, f"{path}.{name}" if path else name)


def find_field(config: PreTrainedConfig, role: str, size: int | None, *first: str, mapped: bool = True) -> str | None:
    """The field of a config that holds a size, under one of the names for its role."""
    for name in (*first, *FIELDS[role].split()):
        real = config.attribute_map.get(name, name)
        whole, _, index = real.partition(".")
        value = vars(config).get(whole)
        if index:
            value = value[int(index)] if isinstance(value, list | tuple) and int(index) < len(value) else None
        if size is not None and type(value) is int and value == size and (mapped or real == name):
            return real
    return None


def width_said(ffn: FFN, config: PreTrainedConfig, *first: str) -> FFN:
    """An FFN with the field that says its width instead of the width, and for experts how many work for a token."""
    role = "neurons" if ffn.down_dim == 0 else "expert_neurons"
    first += tuple(FIELDS["shared_neurons"].split()) if "shared" in ffn.down or ffn.kind == "neurons_2" else ()
    name = find_field(config, role, ffn.num_neurons, *first)
    ffn = replace(ffn, active=field_said(config, "experts_per_token") if ffn.has_experts else None)
    return replace(ffn, neurons=name, num_neurons=None) if name else ffn


def field_said(config: PreTrainedConfig, role: str) -> str | None:
    """The field of a config that says a number of this role, whatever it is."""
    names = (config.attribute_map.get(name, name) for name in FIELDS[role].split())
    return next((name for name in names if type(vars(config).get(name)) is int), None)


def any_hidden(config: PreTrainedConfig) -> int | None:
    name = field_said(config, "hidden")
    return None if name is None else vars(config)[name]
