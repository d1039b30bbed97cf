"""GGUF files of tiny Llamas, written as llama.cpp's converter does, by the package that it is written with.

write_gguf(path, make_llama(), make_tokenizer(), quantized=True)
"""

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_efficient.data.tokenizer import train_tokenizer

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
WORDS = "the cat sat on 12 mats and 345 dogs ran  67 miles to see it"
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def make_tokenizer(size: int = 280) -> PreTrainedTokenizerFast:
    return train_tokenizer([WORDS] * 3, size)


def make_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 280}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    config = LlamaConfig(**sizes | heads | ids | {"tie_word_embeddings": True, "initializer_range": 0.2} | changes)
    return LlamaForCausalLM(config).eval()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbours, transformers halves: the rows of queries and keys lie in another order."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def tensors_of(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    config, state = model.config, {name: value.numpy() for name, value in model.state_dict().items()}
    tensors = {"token_embd.weight": state["model.embed_tokens.weight"]}
    tensors["output_norm.weight"] = state["model.norm.weight"]
    if not config.tie_word_embeddings:
        tensors["output.weight"] = state["lm_head.weight"]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for name, short in NAMES.items():
            weight = state[f"model.layers.{layer}.{name}.weight"]
            tensors[f"blk.{layer}.{short}.weight"] = interleaved(weight, heads[short]) if short in heads else weight
    return tensors


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    quantized: bool = False,
    half: bool = False,
    arch: str = "llama",
    pre: str = "gpt-2",
    fields: dict[str, int] | None = None,
    leave_out: str = "nothing",
) -> dict[str, np.ndarray]:
    """The tensors as they were written, after quantisation.

    `fields`: other numbers than the model's. `leave_out`: part of the name of a tensor.
    """
    config, writer = model.config, gguf.GGUFWriter(path, arch)
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    writer.add_name("tiny")
    for key, number in (numbers | (fields or {})).items():
        writer.add_uint32(f"{arch}.{key}", number)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer, pre)
    written = {}
    for name, weight in tensors_of(model).items():
        if leave_out in name:
            continue
        kind = gguf.GGMLQuantizationType.F32
        if weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.F16 if half else kind
            kind = gguf.GGMLQuantizationType.Q8_0 if quantized else kind
        data = gguf.quantize(weight, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        written[name] = gguf.dequantize(data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, pre: str) -> None:
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if index in special else 1 for index in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
