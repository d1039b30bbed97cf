"""Tiny seeded mixtures of experts of every shape: 8 experts in each of 3 layers, unless the first are dense."""

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

VOCABULARY, EXPERTS = 64, 8
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "intermediate_size": 24,
    "num_experts_per_tok": 2,
}
NARROW = {"moe_intermediate_size": 24, "head_dim": 8}
LATENT = NARROW | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
LATENT |= {"v_head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_shared_experts": 1}
SHARED = NARROW | {"shared_expert_intermediate_size": 24, "num_experts": EXPERTS}
WINDOW = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 8}
# What the config is called, and what is unlike others in it.
SHAPES: dict[str, tuple[str, dict]] = {
    "qwen3_moe": ("Qwen3Moe", NARROW | {"num_experts": EXPERTS, "norm_topk_prob": True}),
    "qwen3_moe, a dense layer": ("Qwen3Moe", NARROW | {"num_experts": EXPERTS, "mlp_only_layers": [1]}),
    "qwen2_moe": ("Qwen2Moe", SHARED),
    "qwen2_moe, every second layer": ("Qwen2Moe", SHARED | {"decoder_sparse_step": 2}),
    "mixtral": ("Mixtral", {"num_local_experts": EXPERTS}),
    "olmoe": ("Olmoe", {"num_experts": EXPERTS}),
    "deepseek_v2": ("DeepseekV2", LATENT | {"n_routed_experts": EXPERTS}),
    "deepseek_v2, groups": (
        "DeepseekV2",
        LATENT | {"n_routed_experts": EXPERTS, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": ("DeepseekV3", LATENT | {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1}),
    "deepseek_v3, groups": ("DeepseekV3", LATENT | {"n_routed_experts": EXPERTS, "n_group": 2, "topk_group": 1}),
    "gpt_oss": ("GptOss", {"num_local_experts": EXPERTS, "head_dim": 8} | WINDOW),
}
LIST = "switch"  # an encoder-decoder whose experts are modules of their own
ALL = [*SHAPES, LIST]
SOME = ("qwen2_moe, every second layer", "deepseek_v3, groups", "gpt_oss", LIST)  # the others with --thorough


def make(shape: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A model with a head, in eval mode, whose weights are large enough that every mistake shows."""
    torch.manual_seed(seed)
    if shape == LIST:
        sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 24, "num_heads": 4, "num_layers": 2}
        sizes |= {"num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 2}
        sizes |= {"num_experts": EXPERTS, "pad_token_id": 0, "decoder_start_token_id": 0, "expert_capacity": 64}
        config = transformers.SwitchTransformersConfig(**sizes | {"dropout_rate": 0.0, "router_jitter_noise": 0.0})
        model = transformers.SwitchTransformersForConditionalGeneration(config)
    else:
        name, fields = SHAPES[shape]
        config = getattr(transformers, f"{name}Config")(**TEXT | fields | changes)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.0 if "embed" in path or "shared." in path else parameter.shape[-1] ** -0.5)
            elif "norm" not in path and path.endswith("bias"):
                parameter.normal_(0, 0.1)
        for path, buffer in model.named_buffers():
            if path.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.05)
    return model.eval()


def make_double(shape: str) -> PreTrainedModel:
    """The same in double precision, of which the fast products of experts know nothing."""
    model = make(shape)
    model.set_experts_implementation("eager")
    return model.double()


def batches(model: PreTrainedModel, count: int = 2, rows: int = 4, length: int = 12) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        if model.config.is_encoder_decoder:
            made[-1]["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, 6), generator=generator)
    return made


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits
