"""The one table of test parameters for model families: a new family is one more entry in `CASES`.

model = make_model("bert")                       # tiny, no dropout, weights large enough to tell models apart
inputs = make_inputs("bert", padding="left")
logits = model(**inputs)[0]
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_efficient.models.classes import auto_classes
from hf_efficient.models.families import FAMILIES

VOCABULARY, LENGTH, PADDED = 50, 13, 5
PAD, END = 0, 1

Inputs = dict[str, Tensor]


def _text(padding: str | None) -> Inputs:
    """The end token stands at a place that is real with every padding: CLIP reads its answer there."""
    ids = torch.randint(3, VOCABULARY, (2, LENGTH))
    ids[:, LENGTH - PADDED - 1] = END
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :PADDED] = 0
    if padding == "right":
        mask[0, -PADDED:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _two_texts(padding: str | None) -> Inputs:
    return _text(padding) | {"decoder_input_ids": torch.randint(3, VOCABULARY, (2, 7))}


def _image(padding: str | None) -> Inputs:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def _image_and_text(padding: str | None) -> Inputs:
    return _text(padding) | _image(None)


def _sound(padding: str | None) -> Inputs:
    return {"input_features": torch.randn(2, 8, 24), "decoder_input_ids": torch.randint(3, VOCABULARY, (2, 7))}


@dataclass(frozen=True)
class Case:
    """One family.

    Fields:
        config: the fields of a tiny config of 3 layers, or a function that makes them of the ones that change.
        head: the class most tests use, one that shows every token.
        auto: the Auto class that loads `head`.
        dropout: the config fields that switch dropout on.
        paddings: the sides on which inputs can be padded; `None` is no padding at all.
        inputs: a side -> inputs of `head`.
        labels: the shape of the labels of `head`; `None` if it takes none.
        hidden: the fields of the output with the hidden states.
        tied: a head with output embeddings tied to the input embeddings, if there is one.
        own_window: config fields that give some layers a sliding window of their own, and the `window` of our local
            attention that equals it.
        lora: linears for adapters.
    """

    config: dict[str, Any] | Callable[..., dict[str, Any]]
    head: type[PreTrainedModel]
    auto: str
    dropout: tuple[str, ...]
    paddings: tuple[str | None, ...] = ("right", "left")
    inputs: Callable[[str | None], Inputs] = _text
    labels: tuple[int, ...] | None = (2, LENGTH)
    hidden: tuple[str, ...] = ("hidden_states",)
    tied: type[PreTrainedModel] | None = None
    own_window: tuple[dict[str, Any], int] | None = None
    lora: list[str] = field(default_factory=list)


_SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": 2}
_BERT = _SIZES | _NO_DROPOUT | _TOKENS | {"max_position_embeddings": 32}
_IMAGE = _SIZES | {"image_size": 16, "patch_size": 4}
_LLAMA = _SIZES | _TOKENS | {"num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

_BART = {"d_model": 16, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0} | _TOKENS
_BART |= {"decoder_start_token_id": 2, "forced_eos_token_id": None}

_DISTILBERT = {"dim": 16, "n_layers": 3, "n_heads": 4, "hidden_dim": 32, "dropout": 0.0, "attention_dropout": 0.0}
_DISTILBERT |= {"seq_classif_dropout": 0.0, "qa_dropout": 0.0, "max_position_embeddings": 32} | _TOKENS
_GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
_GPT2 |= {"attn_pdrop": 0.0, "summary_first_dropout": 0.0} | _TOKENS
_T5 = {"d_model": 16, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4, "d_kv": 4, "d_ff": 32}
_T5 |= {"dropout_rate": 0.0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10}
_T5 |= {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD}
_WHISPER = _BART | {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 32}
_CLIP_TEXT = _SIZES | _TOKENS | {"max_position_embeddings": 32, "projection_dim": 16}
_CLIP_VISION = _IMAGE | {"projection_dim": 16}


def _gemma3(num_hidden_layers: int = 3, **fields: Any) -> dict[str, Any]:
    own = {"layer_types": _SLIDING[:num_hidden_layers], "sliding_window": 64, "query_pre_attn_scalar": 9}
    return _LLAMA | own | {"num_hidden_layers": num_hidden_layers} | fields


def _clip(num_hidden_layers: int = 3, attention_dropout: float = 0.0, **fields: Any) -> dict[str, Any]:
    # The dtype is what transformers writes there once the model was loaded.
    own = {"num_hidden_layers": num_hidden_layers, "attention_dropout": attention_dropout, "dtype": "float32"}
    return {"text_config": _CLIP_TEXT | own, "vision_config": _CLIP_VISION | own, "projection_dim": 16} | fields


def _encoder(name: str, config: dict[str, Any], **facts: Any) -> Case:
    return Case(
        config=config,
        head=getattr(transformers, f"{name}ForTokenClassification"),
        auto="AutoModelForTokenClassification",
        tied=getattr(transformers, f"{name}ForMaskedLM"),
        **{"dropout": ("attention_probs_dropout_prob",), "lora": ["query", "value"]} | facts,
    )


def _classifier(name: str, config: dict[str, Any], dropout: str = "attention_probs_dropout_prob") -> Case:
    return Case(
        config=config,
        head=getattr(transformers, f"{name}ForImageClassification"),
        auto="AutoModelForImageClassification",
        dropout=(dropout,),
        paddings=(None,),
        inputs=_image,
        labels=(2,),
    )


def _decoder(head: str, config: dict[str, Any] | Callable[..., dict[str, Any]], **facts: Any) -> Case:
    head_class = getattr(transformers, head)
    own = {"dropout": ("attention_dropout",), "tied": head_class, "lora": ["q_proj"]}
    return Case(config=config, head=head_class, auto="AutoModelForCausalLM", **own | facts)


def _two_stacks(head: str, config: dict[str, Any], **facts: Any) -> Case:
    head_class = getattr(transformers, head)
    own: dict[str, Any] = {"auto": "AutoModelForSeq2SeqLM", "dropout": ("attention_dropout",), "inputs": _two_texts}
    own |= {"labels": (2, 7), "hidden": ("encoder_hidden_states", "decoder_hidden_states"), "tied": head_class}
    return Case(config=config, head=head_class, **own | {"lora": ["q_proj", "v_proj"]} | facts)


CASES = {
    "bert": _encoder("Bert", _BERT),
    "roberta": _encoder("Roberta", _BERT),
    "xlm-roberta": _encoder("XLMRoberta", _BERT),
    "electra": _encoder("Electra", _BERT | {"embedding_size": 8}),
    "distilbert": _encoder("DistilBert", _DISTILBERT, dropout=("attention_dropout",), lora=["q_lin", "v_lin"]),
    "modernbert": _encoder(
        "ModernBert",
        _SIZES | _TOKENS | {"max_position_embeddings": 64},
        dropout=("attention_dropout",),
        own_window=({"local_attention": 8}, 4),
        lora=["Wqkv"],
    ),
    "vit": _classifier("ViT", _IMAGE | _NO_DROPOUT | {"encoder_stride": 4}),
    "deit": _classifier("DeiT", _IMAGE | _NO_DROPOUT | {"encoder_stride": 4}),
    "dinov2": _classifier("Dinov2", {key: value for key, value in _IMAGE.items() if key != "intermediate_size"}),
    "clip": Case(
        config=_clip,
        head=transformers.CLIPModel,
        auto="AutoModel",
        dropout=("attention_dropout",),
        inputs=_image_and_text,
        labels=None,
        hidden=(),
    ),
    "clip_text_model": Case(
        config=_CLIP_TEXT,
        head=transformers.CLIPTextModel,
        auto="AutoModel",
        dropout=("attention_dropout",),
        labels=None,
    ),
    "clip_vision_model": Case(
        config=_CLIP_VISION,
        head=transformers.CLIPVisionModel,
        auto="AutoModel",
        dropout=("attention_dropout",),
        paddings=(None,),
        inputs=_image,
        labels=None,
    ),
    "llama": _decoder("LlamaForCausalLM", _LLAMA),
    "mistral": _decoder("MistralForCausalLM", _LLAMA, own_window=({"sliding_window": 5}, 5)),
    "qwen3": _decoder(
        "Qwen3ForCausalLM",
        _LLAMA,
        own_window=({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, 5),
    ),
    "gemma3_text": _decoder("Gemma3ForCausalLM", _gemma3, own_window=({"sliding_window": 5}, 5)),
    "gpt2": _decoder("GPT2LMHeadModel", _GPT2, dropout=("attn_pdrop",), lora=["c_attn"]),
    "t5": _two_stacks("T5ForConditionalGeneration", _T5, dropout=("dropout_rate",), lora=["q", "v"]),
    "bart": _two_stacks("BartForConditionalGeneration", _BART | {"max_position_embeddings": 32}),
    "marian": _two_stacks("MarianMTModel", _BART | {"max_position_embeddings": 32, "decoder_start_token_id": PAD}),
    "whisper": _two_stacks(
        "WhisperForConditionalGeneration",
        _WHISPER,
        auto="AutoModelForSpeechSeq2Seq",
        paddings=(None,),
        inputs=_sound,
    ),
}

# Every family with every side its inputs can be padded on, and every Auto class with every head it gives.
PADDED_CASES = [(name, side) for name, case in CASES.items() for side in case.paddings]
HEADS = [(name, auto) for name in CASES for auto in auto_classes(FAMILIES[name])]

# One family of every build: split and joined projections, grouped keys, images, rotary, relative, two stacks, nested.
BUILDS = ("bert", "modernbert", "vit", "llama", "gpt2", "t5", "bart", "clip")
TWO_STACKS = [name for name, case in CASES.items() if len(case.hidden) == 2]
CAUSAL = [name for name, case in CASES.items() if case.auto == "AutoModelForCausalLM"]
TEXTS = [name for name, case in CASES.items() if case.inputs is _text]


def make_config(name: str, **fields: Any) -> PreTrainedConfig:
    """A tiny stock config of 3 layers."""
    config_class, config = getattr(transformers, FAMILIES[name].config_name), CASES[name].config
    return config_class(**(config(**fields) if callable(config) else config | fields))


def make_model(name: str, head: type[PreTrainedModel] | None = None, **fields: Any) -> PreTrainedModel:
    """A tiny stock model in eval mode; `fields` change its config. Tables that are a formula stay."""
    model = (head or CASES[name].head)(make_config(name, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model.eval()


def one_layer(name: str) -> dict[str, int]:
    """The fields of a config with one layer in every stack, for what does not depend on their number."""
    return {stack.num_layers: 1 for stack in FAMILIES[name].stacks}


def make_inputs(name: str, padding: str | None = None, model: PreTrainedModel | None = None) -> Inputs:
    """Two rows, the first with `PADDED` padded tokens that hold junk; fitted to the head of `model` if given."""
    inputs = CASES[name].inputs(padding)
    if model is None:
        return inputs
    if "MultipleChoice" in type(model).__name__:
        return {key: value.unsqueeze(1).repeat(1, 2, 1) for key, value in inputs.items()}
    if name in TWO_STACKS and "SequenceClassification" in type(model).__name__:
        del inputs["decoder_input_ids"]  # it reads its answer at the one end token of a row
    known = inspect.signature(model.forward).parameters
    if "input_features" in inputs and "input_ids" in known:
        inputs["input_ids"] = inputs["decoder_input_ids"]
    return {key: value for key, value in inputs.items() if key in known}


def make_labels(name: str) -> Inputs:
    """Labels for the head of a family, under the name that it wants; none where it takes none."""
    shape = CASES[name].labels
    return {} if shape is None else {"labels": torch.randint(0, 2, shape)}


def position_ids(model: PreTrainedModel, mask: Tensor) -> Inputs:
    """Position ids that count real tokens only, for the models that take any."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    family = FAMILIES[model.config.model_type.removeprefix("efficient_")]
    first = family.first_position(model.config) if family.positions_after_pad else 0
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0) + first}


def real_logits(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """The first output, without the rows of padded tokens (nobody promises anything about those)."""
    logits = model(**inputs)[0]
    mask = inputs.get("attention_mask")
    return logits[mask.bool()] if mask is not None and mask.shape == logits.shape[:2] else logits
