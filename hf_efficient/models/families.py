"""The table of model families: where stock models keep their layers, projections, neurons and their sizes.

    FAMILIES["bert"].stacks[0].layers                    # "encoder.layer"

What stands here need not be derived, and is what derived entries are compared with in tests. Any other architecture is
found out from a tiny model of it (`derive`).
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

from packaging.version import Version

from .family import Attention, Family, Stack

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _encoder(layers: str, attention: Attention, up: tuple[str, ...], down: str, **fields) -> Stack:
    return Stack(name="encoder", layers=layers, attention=attention, up=up, down=down, **fields)


def _bert_attention(path: str) -> Attention:
    return Attention(
        module=f"{path}.self",
        query=f"{path}.self.query",
        key=f"{path}.self.key",
        value=f"{path}.self.value",
        output=f"{path}.output.dense",
        head_attributes=("num_attention_heads",),
        width_attributes=("all_head_size",),
    )


def _attention(path: str, output: str, *head_attributes: str) -> Attention:
    """The usual names: `q_proj`, `k_proj`, `v_proj` inside the attention module."""
    return Attention(
        module=path,
        query=f"{path}.q_proj",
        key=f"{path}.k_proj",
        value=f"{path}.v_proj",
        output=f"{path}.{output}",
        head_attributes=head_attributes,
    )


_BERT = Family(
    model_type="bert",
    config_name="BertConfig",
    norm="post",
    stacks=(
        _encoder(
            layers="encoder.layer",
            attention=_bert_attention("attention"),
            cross_attention=_bert_attention("crossattention"),
            cross_if="add_cross_attention",
            up=("intermediate.dense",),
            down="output.dense",
        ),
    ),
    positions=("embeddings.position_embeddings",),
    max_positions="max_position_embeddings",
)
_ELECTRA = replace(_BERT, model_type="electra", config_name="ElectraConfig")
_ROBERTA = replace(_BERT, model_type="roberta", config_name="RobertaConfig", positions_after_pad=True)
_XLM_ROBERTA = replace(_ROBERTA, model_type="xlm-roberta", config_name="XLMRobertaConfig")

_DISTILBERT = Family(
    model_type="distilbert",
    config_name="DistilBertConfig",
    norm="post",
    stacks=(
        _encoder(
            layers="transformer.layer",
            attention=Attention(
                module="attention",
                query="attention.q_lin",
                key="attention.k_lin",
                value="attention.v_lin",
                output="attention.out_lin",
                head_attributes=("n_heads",),
            ),
            up=("ffn.lin1",),
            down="ffn.lin2",
            num_layers="n_layers",
            hidden="dim",
            heads="n_heads",
            neurons="hidden_dim",
        ),
    ),
    positions=("embeddings.position_embeddings",),
    max_positions="max_position_embeddings",
)

_MODERNBERT = Family(
    model_type="modernbert",
    config_name="ModernBertConfig",
    norm="pre",
    stacks=(
        _encoder(
            layers="layers",
            attention=Attention(
                module="attn", query="attn.Wqkv", key="attn.Wqkv", value="attn.Wqkv", output="attn.Wo"
            ),
            up=("mlp.Wi", "mlp.Wi"),
            down="mlp.Wo",
        ),
    ),
    per_layer=("layer_types",),
    first_stays=True,
    max_positions="max_position_embeddings",
)

_VIT = Family(
    model_type="vit",
    config_name="ViTConfig",
    norm="pre",
    stacks=(
        _encoder(
            layers="layers",
            attention=_attention("attention", "o_proj", "num_attention_heads"),
            up=("mlp.fc1",),
            down="mlp.fc2",
            head_dim="head_dim",
        ),
    ),
)
_DEIT = replace(_VIT, model_type="deit", config_name="DeiTConfig")


def _dinov2_neurons(config: PreTrainedConfig) -> int:
    wide = int(config.hidden_size * config.mlp_ratio)
    return (int(wide * 2 / 3) + 7) // 8 * 8 if config.use_swiglu_ffn else wide


# Since 5.18 DINOv2 is built as ViT is.
_NEW_DINOV2 = Version(version("transformers")).release >= (5, 18)
_DINOV2 = Family(
    model_type="dinov2",
    config_name="Dinov2Config",
    stacks=(
        _encoder(
            layers="encoder.layer",
            attention=_attention("attention", "o_proj", "num_attention_heads")
            if _NEW_DINOV2
            else Attention(
                module="attention.attention",
                query="attention.attention.query",
                key="attention.attention.key",
                value="attention.attention.value",
                output="attention.output.dense",
                head_attributes=("num_attention_heads",),
                width_attributes=("all_head_size",),
            ),
            up=("mlp.fc1",),
            down="mlp.fc2",
            gated_up=("mlp.gate_proj", "mlp.up_proj") if _NEW_DINOV2 else ("mlp.weights_in", "mlp.weights_in"),
            gated_down="mlp.down_proj" if _NEW_DINOV2 else "mlp.weights_out",
            neurons=None,
            count_neurons=_dinov2_neurons,
            head_dim="head_dim" if _NEW_DINOV2 else None,
        ),
    ),
    gated="use_swiglu_ffn",
    of_depth=("stage_names", "out_features", "out_indices"),
)

_CLIP_TEXT_STACK = Stack(
    name="text",
    layers="encoder.layers",
    attention=_attention("self_attn", "out_proj", "num_heads"),
    up=("mlp.fc1",),
    down="mlp.fc2",
)
_CLIP_VISION_STACK = replace(_CLIP_TEXT_STACK, name="vision")
_CLIP_TEXT = Family(
    model_type="clip_text_model",
    config_name="CLIPTextConfig",
    norm="pre",
    stacks=(_CLIP_TEXT_STACK,),
    positions=("embeddings.position_embedding",),
    max_positions="max_position_embeddings",
)
_CLIP_VISION = Family(
    model_type="clip_vision_model", config_name="CLIPVisionConfig", norm="pre", stacks=(_CLIP_VISION_STACK,)
)
_CLIP = Family(
    model_type="clip",
    config_name="CLIPConfig",
    norm="pre",
    stacks=(
        replace(_CLIP_TEXT_STACK, layers="text_model.encoder.layers", config="text_config"),
        replace(_CLIP_VISION_STACK, layers="vision_model.encoder.layers", config="vision_config", sees_patches=True),
    ),
)

_LLAMA = Family(
    model_type="llama",
    config_name="LlamaConfig",
    norm="pre",
    stacks=(
        Stack(
            name="decoder",
            layers="layers",
            attention=_attention("self_attn", "o_proj"),
            up=("mlp.gate_proj", "mlp.up_proj"),
            down="mlp.down_proj",
            kv_heads="num_key_value_heads",
            head_dim="head_dim",
        ),
    ),
    heads_divide_hidden=True,
    max_positions="max_position_embeddings",
)
_MISTRAL = replace(_LLAMA, model_type="mistral", config_name="MistralConfig", heads_divide_hidden=False)
_QWEN3 = replace(_MISTRAL, model_type="qwen3", config_name="Qwen3Config", per_layer=("layer_types",))
_GEMMA3 = replace(
    _LLAMA, model_type="gemma3_text", config_name="Gemma3TextConfig", norm=None, per_layer=("layer_types",)
)


def _gpt2_neurons(config: PreTrainedConfig) -> int:
    return config.n_inner or 4 * config.n_embd


def _gpt2_attention(path: str, query: str) -> Attention:
    return Attention(
        module=path,
        query=f"{path}.{query}",
        key=f"{path}.c_attn",
        value=f"{path}.c_attn",
        output=f"{path}.c_proj",
        head_attributes=("num_heads",),
        width_attributes=("split_size",),
    )


_GPT2 = Family(
    model_type="gpt2",
    config_name="GPT2Config",
    norm="pre",
    stacks=(
        Stack(
            name="decoder",
            layers="h",
            attention=_gpt2_attention("attn", "c_attn"),
            cross_attention=_gpt2_attention("crossattention", "q_attn"),
            cross_if="add_cross_attention",
            up=("mlp.c_fc",),
            down="mlp.c_proj",
            num_layers="n_layer",
            hidden="n_embd",
            heads="n_head",
            neurons="n_inner",
            count_neurons=_gpt2_neurons,
        ),
    ),
    positions=("wpe",),
    max_positions="n_positions",
)


def _t5_attention(path: str) -> Attention:
    return Attention(
        module=path,
        query=f"{path}.q",
        key=f"{path}.k",
        value=f"{path}.v",
        output=f"{path}.o",
        head_attributes=("n_heads",),
        width_attributes=("inner_dim",),
    )


def _t5_stack(name: str, num_layers: str, ffn: str, cross_attention: Attention | None = None) -> Stack:
    return Stack(
        name=name,
        layers=f"{name}.block",
        attention=_t5_attention("layer.0.SelfAttention"),
        cross_attention=cross_attention,
        up=(f"{ffn}.wi",),
        gated_up=(f"{ffn}.wi_0", f"{ffn}.wi_1"),
        down=f"{ffn}.wo",
        num_layers=num_layers,
        hidden="d_model",
        heads="num_heads",
        neurons="d_ff",
        head_dim="d_kv",
    )


_T5 = Family(
    model_type="t5",
    config_name="T5Config",
    norm="pre",
    stacks=(
        _t5_stack("encoder", "num_layers", "layer.1.DenseReluDense"),
        _t5_stack("decoder", "num_decoder_layers", "layer.2.DenseReluDense", _t5_attention("layer.1.EncDecAttention")),
    ),
    gated="is_gated_act",
    relative_bias="layer.0.SelfAttention.relative_attention_bias",
    encoder_sizes_cache=True,
)


def _bart_stack(name: str, cross_attention: Attention | None = None) -> Stack:
    return Stack(
        name=name,
        layers=f"{name}.layers",
        attention=_attention("self_attn", "out_proj", "num_heads"),
        cross_attention=cross_attention,
        up=("fc1",),
        down="fc2",
        num_layers=f"{name}_layers",
        hidden="d_model",
        heads=f"{name}_attention_heads",
        neurons=f"{name}_ffn_dim",
    )


_BART = Family(
    model_type="bart",
    config_name="BartConfig",
    norm="post",
    stacks=(_bart_stack("encoder"), _bart_stack("decoder", _attention("encoder_attn", "out_proj", "num_heads"))),
    positions=("encoder.embed_positions", "decoder.embed_positions"),
    max_positions="max_position_embeddings",
    position_offset=2,
)
_MARIAN = replace(_BART, model_type="marian", config_name="MarianConfig", position_offset=0, sinusoidal=True)
_WHISPER = replace(
    _BART,
    model_type="whisper",
    config_name="WhisperConfig",
    norm="pre",
    positions=("decoder.embed_positions",),  # those of the encoder belong to 30 seconds of sound
    max_positions="max_target_positions",
    position_offset=0,
)

_TEXT = (_BERT, _ROBERTA, _XLM_ROBERTA, _DISTILBERT, _ELECTRA, _MODERNBERT)
_VISION = (_VIT, _DEIT, _DINOV2, _CLIP, _CLIP_TEXT, _CLIP_VISION)
_GENERATIVE = (_LLAMA, _MISTRAL, _QWEN3, _GEMMA3, _GPT2, _T5, _BART, _MARIAN, _WHISPER)

FAMILIES: dict[str, Family] = {family.model_type: family for family in (*_TEXT, *_VISION, *_GENERATIVE)}
