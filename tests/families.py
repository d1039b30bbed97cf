"""The one table of test parameters for model families: a new family is one more entry in `CASES`.

model = make_model("bert")                       # tiny, no dropout, weights large enough to tell models apart
inputs = make_inputs("bert", padding="left")
logits = model(**inputs)[0]
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_efficient.families import FAMILIES
from hf_efficient.models.building import auto_classes

VOCABULARY, LENGTH, PADDED = 50, 13, 5
PAD, END = 0, 1


@dataclass(frozen=True)
class Case:
    """One family.

    Fields:
        config: keyword arguments -> a tiny config of 3 layers.
        head: the class most tests use, one that shows every token.
        auto: the Auto class that loads `head`.
        dropout: the config fields that switch dropout on.
        paddings: the sides on which inputs can be padded; `None` is no padding at all.
        neurons: the config field with the FFN width.
    """

    config: Callable[..., PreTrainedConfig]
    head: type[PreTrainedModel]
    auto: str
    dropout: tuple[str, ...]
    paddings: tuple[str | None, ...] = ("right", "left")
    neurons: str = "intermediate_size"


def _bert(**fields: Any) -> BertConfig:
    own = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
    own |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(**own | {"vocab_size": VOCABULARY, "max_position_embeddings": 32} | fields)


def _vit(**fields: Any) -> ViTConfig:
    own = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
    own |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "encoder_stride": 4}
    return ViTConfig(**own | {"image_size": 16, "patch_size": 4} | fields)


def _llama(**fields: Any) -> LlamaConfig:
    own = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
    own |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
    return LlamaConfig(**own | {"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": 2} | fields)


def _t5(**fields: Any) -> T5Config:
    own = {"d_model": 16, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4, "d_kv": 4, "d_ff": 32}
    own |= {"vocab_size": VOCABULARY, "dropout_rate": 0.0, "relative_attention_num_buckets": 8}
    own |= {"relative_attention_max_distance": 10, "decoder_start_token_id": PAD}
    return T5Config(**own | {"pad_token_id": PAD, "eos_token_id": END} | fields)


CASES = {
    "bert": Case(
        config=_bert,
        head=BertForTokenClassification,
        auto="AutoModelForTokenClassification",
        dropout=("attention_probs_dropout_prob",),
    ),
    "vit": Case(
        config=_vit,
        head=ViTForImageClassification,
        auto="AutoModelForImageClassification",
        dropout=("attention_probs_dropout_prob",),
        paddings=(None,),
    ),
    "llama": Case(
        config=_llama,
        head=LlamaForCausalLM,
        auto="AutoModelForCausalLM",
        dropout=("attention_dropout",),
    ),
    "t5": Case(
        config=_t5,
        head=T5ForConditionalGeneration,
        auto="AutoModelForSeq2SeqLM",
        dropout=("dropout_rate",),
        neurons="d_ff",
    ),
}

# Every family with every side its inputs can be padded on, and every Auto class with every head it gives.
PADDED_CASES = [(name, side) for name, case in CASES.items() for side in case.paddings]
HEADS = [(name, auto) for name in CASES for auto in auto_classes(FAMILIES[name])]


def make_model(name: str, head: type[PreTrainedModel] | None = None, **fields: Any) -> PreTrainedModel:
    """A tiny stock model in eval mode; `fields` change its config."""
    model = (head or CASES[name].head)(CASES[name].config(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model.eval()


def make_inputs(name: str, padding: str | None = None, model: PreTrainedModel | None = None) -> dict[str, Tensor]:
    """Two rows, the first with `PADDED` padded tokens that hold junk; fitted to the head of `model` if given."""
    inputs = _image_inputs() if name == "vit" else _text_inputs(padding)
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 7))
    if model is None:
        return inputs
    if "MultipleChoice" in type(model).__name__:
        return {key: value.unsqueeze(1).repeat(1, 2, 1) for key, value in inputs.items()}
    if name == "t5" and "SequenceClassification" in type(model).__name__:
        inputs["input_ids"][:, 6] = END  # it reads its answer at the one end token of a row
        del inputs["decoder_input_ids"]
    known = inspect.signature(model.forward).parameters
    return {key: value for key, value in inputs.items() if key in known}


def _image_inputs() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def _text_inputs(padding: str | None) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, LENGTH))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :PADDED] = 0
    if padding == "right":
        mask[0, -PADDED:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def real_logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The first output, without the rows of padded tokens (nobody promises anything about those)."""
    logits = model(**inputs)[0]
    mask = inputs.get("attention_mask")
    return logits[mask.bool()] if mask is not None and mask.shape == logits.shape[:2] else logits
