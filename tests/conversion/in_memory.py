"""Tiny models that are converted in memory.

Most of them can be derived; they stand for those that cannot.
"""

import torch
import transformers

from hf_efficient import (
    AttentionConfig,
)
from hf_efficient.attention.dispatch import ATTACHED
from hf_efficient.conversion.in_memory import convert_in_memory
from hf_efficient.conversion.mixing import only

from ..families import VOCABULARY

FULL = AttentionConfig()
WIDE = AttentionConfig("local", window=64)
NARROW = AttentionConfig("local", window=2)
LINEAR = AttentionConfig("linear")

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
OPT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 32, "word_embed_proj_dim": 16}
SOUND = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 4}
MBART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
MBART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 32}
TEXT = SIZES | TOKENS | {"num_key_value_heads": 2}
IMAGE = SIZES | {"image_size": 16, "patch_size": 4}

# name: (model class, config class, config fields, how many self-attentions)
MODELS = {
    "opt": ("OPTForCausalLM", "OPTConfig", OPT | TOKENS | {"max_position_embeddings": 32}, 3),
    "pythia": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES | TOKENS | {"max_position_embeddings": 32}, 3),
    "phi": ("PhiForCausalLM", "PhiConfig", SIZES | TOKENS | {"max_position_embeddings": 32}, 3),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SIZES | TOKENS | {"num_key_value_heads": 2}, 3),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", MBART | TOKENS | {"decoder_start_token_id": 2}, 4),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", SIZES | SOUND | {"num_conv_pos_embedding_groups": 2}, 3),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        {"text_config": SIZES | TOKENS | {"max_position_embeddings": 16}, "vision_config": IMAGE},
        6,
    ),
}
GENERATING = ["opt", "pythia", "phi", "qwen2", "mbart"]


def convert_attention(model, config, layers=None):
    return convert_in_memory(model, only(config, layers) if isinstance(config, AttentionConfig) else config)


def make(name, **changes):
    """A tiny stock model in eval mode with weights large enough to matter."""
    model_class, config_class, fields, _ = MODELS[name]
    return randomize(getattr(transformers, model_class)(getattr(transformers, config_class)(**fields | changes)))


def randomize(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model.eval()


def make_inputs(name, side=None):
    if name == "wav2vec2":
        return {"input_values": torch.randn(2, 200)}
    ids = torch.randint(3, VOCABULARY, (2, 13))
    mask = torch.ones_like(ids)
    if side is not None:
        mask[0, slice(0, 5) if side == "left" else slice(8, 13)] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name == "mbart":
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 7))
    return inputs | ({"pixel_values": torch.randn(2, 3, 16, 16)} if name == "siglip" else {})


def real(model, inputs):
    logits, mask = model(**inputs)[0], inputs.get("attention_mask")
    return logits[mask.bool()] if mask is not None and mask.shape == logits.shape[:2] else logits


def kinds(model):
    return [module.config.kind for name, module in model.named_modules() if name.endswith(ATTACHED)]
