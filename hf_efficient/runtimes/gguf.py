"""Decoders of the Llama family as GGUF files, for llama.cpp and all that is built on it.

    write_gguf(model, tokenizer, "out/model.gguf")                  # or quantize="int8": blocks of 8 bits (Q8_0)

Layers of equal sizes are of the architecture that llama.cpp has for the model (`llama`, `qwen2`, `qwen3`). Where
pruning left layers of unequal sizes, a Llama becomes a `deci`, which has numbers of heads and neurons for each layer
(DeciLM, Llama-Nemotron): so it needs no plugin there. The queries and keys of a Llama lie in another order: llama.cpp
rotates neighbours, transformers the halves of a head.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from ..io.json import parse_json

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel

FILE = "model.gguf"
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
UNEVEN = {"llama": "deci"}  # with numbers of its own for each layer
_SPLITS = {  # how a byte-level tokenizer cuts texts, as the names that llama.cpp has for it
    "gpt-2": [{"type": "ByteLevel", "use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}],
}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class Sizes:
    """What each layer has."""

    heads: list[int]
    kv_heads: list[int]
    neurons: list[int]

    @property
    def are_equal(self) -> bool:
        return all(len(set(each)) == 1 for each in (self.heads, self.kv_heads, self.neurons))


def check_gguf(model: "PreTrainedModel") -> str:
    """The architecture that llama.cpp has for a model; UnsupportedModelError where it has none."""
    from ..models.classes import block_of
    from ..models.registry import stock_type

    name, config = stock_type(model.config), model.config
    if name not in ARCHITECTURES or not type(model).__name__.endswith("ForCausalLM"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not written as GGUF; language models of {', '.join(ARCHITECTURES)} are. "
            "Save it with save_pretrained and convert it with llama.cpp's convert_hf_to_gguf.py."
        )
    kinds = {each.kind for stack in block_of(config).stacks.values() for each in stack.attention or ()}
    if kinds - {"full"}:
        raise UnsupportedModelError(
            f"llama.cpp has no attention of the kind {', '.join(sorted(kinds - {'full'}))}. Export a model with its "
            "own attention."
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ("default", "linear", "llama3"):
        raise UnsupportedModelError(
            f"Positions of the kind {rope!r} are not written as GGUF; default, linear and llama3 are. Convert it with "
            "llama.cpp's convert_hf_to_gguf.py."
        )
    if getattr(config, "use_sliding_window", False) or (name == "mistral" and config.sliding_window):
        raise UnsupportedModelError(
            "Sliding windows are not written as GGUF. Set sliding_window to None to drop them."
        )
    sizes = sizes_of(model)
    if not sizes.are_equal and ARCHITECTURES[name] not in UNEVEN:
        raise UnsupportedModelError(
            f"llama.cpp has layers of unequal sizes for {', '.join(UNEVEN)} alone, and this is {name}. Prune with "
            "allocation='uniform'."
        )
    return ARCHITECTURES[name] if sizes.are_equal else UNEVEN[ARCHITECTURES[name]]


def sizes_of(model: "PreTrainedModel") -> Sizes:
    """By the weights: a pruned model has other numbers than its config's."""
    layers, size = model.base_model.layers, head_size(model.config)
    return Sizes(
        [layer.self_attn.q_proj.out_features // size for layer in layers],
        [layer.self_attn.k_proj.out_features // size for layer in layers],
        [layer.mlp.up_proj.out_features for layer in layers],
    )


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def write_gguf(model: "PreTrainedModel", tokenizer: Any, path: str | Path, quantize: str | None = None) -> None:
    """Write the model with its tokenizer and chat template.

    Parameters:
        tokenizer: byte-level BPE.
        quantize: `"int8"`: weights in blocks of 32 numbers of 8 bits with one scale (Q8_0); a matrix whose rows are no
            whole number of blocks has 16 bits. Default: as they are, norms in float32.

    Raises:
        UnsupportedModelError: llama.cpp has no such model, or no such tokenizer.
    """
    import gguf

    arch, split = check_gguf(model), split_of(tokenizer)
    writer = gguf.GGUFWriter(str(path), arch)
    try:
        _write_config(writer, model, arch)
        _write_tokenizer(writer, tokenizer, split, model.get_input_embeddings().weight.shape[0])
        for name, tensor in _tensors(model, arch):
            _write_tensor(writer, name, tensor, quantize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _write_config(writer: Any, model: "PreTrainedModel", arch: str) -> None:
    config, sizes, size = model.config, sizes_of(model), head_size(model.config)

    def number(values: list[int]) -> Any:
        return values[0] if arch not in UNEVEN.values() else values

    writer.add_name(f"{type(model).__name__} by hf_efficient")
    writer.add_block_count(len(sizes.heads))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(number(sizes.heads))
    writer.add_head_count_kv(number(sizes.kv_heads))
    writer.add_feed_forward_length(number(sizes.neurons))
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _write_tokenizer(writer: Any, tokenizer: Any, split: str, size: int) -> None:
    known = tokenizer.get_vocab()
    tokens, kinds = [f"[PAD{index}]" for index in range(size)], [_UNUSED] * size
    for token, index in known.items():
        tokens[index], kinds[index] = token, _NORMAL
    for index, added in tokenizer.added_tokens_decoder.items():
        tokens[index], kinds[index] = added.content, _CONTROL if added.special else _USER_DEFINED
    merges = parse_json(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    ids |= {"pad": tokenizer.pad_token_id, "unk": tokenizer.unk_token_id}
    for name, index in ids.items():
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    some = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(some[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(some) > 1 and some[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def split_of(tokenizer: Any) -> str:
    """llama.cpp's name for how a tokenizer cuts texts; UnsupportedModelError if it has none that we know."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    made = parse_json(backend.to_str()) if backend is not None else {}
    outer = made.get("pre_tokenizer") or {}
    parts = outer.get("pretokenizers", [outer])
    is_plain = (made.get("model") or {}).get("type") == "BPE" and made.get("normalizer") is None
    for name, wanted in _SPLITS.items():
        pairs = zip(parts, wanted, strict=False)
        same = len(parts) == len(wanted) and all(part.items() >= each.items() for part, each in pairs)
        if is_plain and same and not any(part.get("add_prefix_space") for part in parts):
            return name
    raise UnsupportedModelError(
        f"The tokenizer ({type(tokenizer).__name__}) is not written as GGUF; byte-level BPE that cuts texts as "
        f"{' or '.join(_SPLITS)} is. Save the model with save_pretrained and convert it with llama.cpp's "
        "convert_hf_to_gguf.py."
    )


def _tensors(model: "PreTrainedModel", arch: str) -> "list[tuple[str, Tensor]]":
    """By llama.cpp's names; a head that is tied to the embeddings is not written again."""
    import gguf
    import torch

    [number] = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch]
    names = gguf.get_tensor_name_map(number, len(model.base_model.layers))
    tied = model.config.tie_word_embeddings
    size, found = head_size(model.config), []
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        short = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if short is None:
            raise UnsupportedModelError(f"llama.cpp's {arch} has no place for {name} of {type(model).__name__}.")
        tensor = tensor.detach().cpu()
        if arch in ("llama", "deci") and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            halves = tensor.reshape(tensor.shape[0] // size, 2, size // 2, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        found.append((short, tensor))
    if model.config.rope_parameters.get("rope_type") == "llama3":
        found.append(("rope_freqs.weight", torch.tensor(_slower(model.config), dtype=torch.float32)))
    return found


def _slower(config: Any) -> list[float]:
    """By how much Llama 3.1 slows each frequency: those that turn rarely within the first context, by the factor."""
    rope, size = config.rope_parameters, head_size(config)
    low, high, first = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    factors = []
    for place in range(0, size, 2):
        turns = first / (2 * math.pi * rope["rope_theta"] ** (place / size))  # within the first context
        part = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - part) / rope["factor"] + part))
    return factors


def _write_tensor(writer: Any, name: str, tensor: "Tensor", quantize: str | None) -> None:
    import gguf
    import torch

    kinds = gguf.GGMLQuantizationType
    kind = {torch.float16: kinds.F16, torch.bfloat16: kinds.BF16}.get(tensor.dtype, kinds.F32)
    if tensor.dim() < 2:
        kind = kinds.F32
    elif quantize is not None:
        kind = kinds.Q8_0 if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kinds.Q8_0][0] == 0 else kinds.F16
    data: np.ndarray = tensor.float().contiguous().numpy()
    writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
