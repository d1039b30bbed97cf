"""Tiny models of every family with weights large enough to have an opinion, and batches with ragged padding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_efficient import PruningConfig
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.groups import Group, output_weight

HIDDEN, HEADS, WIDTH, NEURONS, VOCABULARY, LABELS = 32, 4, 8, 48, 40, 3
Batch = dict[str, torch.Tensor]


def bert(layers: int = 3, **changes: Any) -> PreTrainedModel:
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": LABELS} | changes
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=HIDDEN,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            intermediate_size=NEURONS,
            vocab_size=VOCABULARY,
            max_position_embeddings=32,
            **settings,
        )
    )


def vit(layers: int = 3, **changes: Any) -> PreTrainedModel:
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "image_size": 8} | changes
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=HIDDEN,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            intermediate_size=NEURONS,
            patch_size=4,
            num_labels=LABELS,
            **settings,
        )
    )


def llama(layers: int = 3, **changes: Any) -> PreTrainedModel:
    """Grouped-query attention: 4 query heads, 2 key/value heads, so 2 units."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=HIDDEN,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            intermediate_size=NEURONS,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **changes,
        )
    )


def gpt2(layers: int = 3) -> PreTrainedModel:
    """Queries, keys and values come from one fused `Conv1D`."""
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=HIDDEN,
            n_layer=layers,
            n_head=HEADS,
            n_inner=NEURONS,
            vocab_size=VOCABULARY,
            n_positions=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **dropouts,
        )
    )


def t5(layers: int = 3, decoder_layers: int = 2, **changes: Any) -> PreTrainedModel:
    settings = {"dropout_rate": 0.0, "feed_forward_proj": "gelu"} | changes
    return T5ForConditionalGeneration(
        T5Config(
            d_model=HIDDEN,
            num_layers=layers,
            num_decoder_layers=decoder_layers,
            num_heads=HEADS,
            d_kv=WIDTH,
            d_ff=NEURONS,
            vocab_size=VOCABULARY,
            relative_attention_num_buckets=8,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
            **settings,
        )
    )


def gated_t5(layers: int = 3, decoder_layers: int = 2) -> PreTrainedModel:
    return t5(layers, decoder_layers, feed_forward_proj="gated-gelu")


def text_batch(seed: int = 0) -> Batch:
    batch = token_batch(seed)
    return batch | {"labels": torch.tensor([0, 2, 1])}


def token_batch(seed: int = 0, side: str = "right") -> Batch:
    """3 x 9 tokens, of which 0, 2 and 4 are padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(3):
        if row:
            mask[row, slice(-2 * row, None) if side == "right" else slice(0, 2 * row)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def causal_batch(seed: int = 0) -> Batch:
    batch = token_batch(seed, side="left")
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def seq2seq_batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed + 100)
    return token_batch(seed) | {"labels": torch.randint(3, VOCABULARY, (3, 7), generator=generator)}


def image_batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(3, 3, 8, 8, generator=generator), "labels": torch.tensor([0, 2, 1])}


@dataclass(frozen=True)
class Case:
    make: Callable[..., PreTrainedModel]
    batch: Callable[..., Batch]


CASES = {
    "bert": Case(bert, text_batch),
    "vit": Case(vit, image_batch),
    "llama": Case(llama, causal_batch),
    "gpt2": Case(gpt2, causal_batch),
    "t5": Case(t5, seq2seq_batch),
    "gated-t5": Case(gated_t5, seq2seq_batch),
}


def make(case: str, *sizes: int, seed: int = 0) -> PreTrainedModel:
    """In eval mode; biases and norms are random too, so that a forgotten slice shows."""
    torch.manual_seed(seed)
    model = CASES[case].make(*sizes).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


def batch(case: str, seed: int = 0) -> Batch:
    return CASES[case].batch(seed)


def batches(case: str, count: int = 2) -> list[Batch]:
    return [batch(case, seed) for seed in range(count)]


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: Batch) -> torch.Tensor:
    """Float inputs in the dtype of the model; outputs at padded positions, which mean nothing, are zero."""
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    out = model(**inputs).logits
    mask = inputs.get("attention_mask")
    return out * mask[..., None] if mask is not None and out.shape[:2] == mask.shape else out


def depths(model: PreTrainedModel) -> dict[str, int]:
    return {stack.name: len(stack.layers) for stack in Anatomy.of(model).stacks}


def sizes(model: PreTrainedModel) -> dict[tuple[str, str, int], int]:
    """Units of every group by (stack, kind, first layer)."""
    return {(group.stack, group.kind, group.layers[0]): group.units for group in Anatomy.of(model).groups}


def kept_parts(dense: PreTrainedModel, small: PreTrainedModel) -> dict[Group, tuple[int, ...]]:
    """Which units of `dense` survive in `small`, found by comparing the weights that make them."""
    found = {}
    for group, other in zip(Anatomy.of(dense).groups, Anatomy.of(small).groups, strict=True):
        before, after = _first_inputs(dense, group), _first_inputs(small, other)
        found[group] = tuple(unit for unit in range(group.units) if any(torch.equal(before[unit], b) for b in after))
        assert len(found[group]) == other.units
    return found


def _first_inputs(model: PreTrainedModel, group: Group) -> torch.Tensor:
    """`[units, weights of a unit]`"""
    member = group.members[0]
    part = member.inputs[0]
    return part.by_unit(model.get_parameter(f"{member.prefix}.{part.name}"))


@torch.no_grad()
def zero_units(model: PreTrainedModel, kept: dict[Group, tuple[int, ...]]) -> None:
    """Cut the outputs of all units that are not kept: what the pruned model must compute, in the dense shape."""
    for group, units in kept.items():
        gone = torch.tensor([unit for unit in range(group.units) if unit not in units], dtype=torch.long)
        for member in group.members:
            weight = output_weight(model, member)
            weight.index_fill_(member.output.dim, member.output.rows(gone, weight), 0)


def measured_macs(model, inputs) -> int:
    """Multiply-accumulates inside the layers, for one sequence. The eager attention shows its products."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    counts = counter.get_flop_counts()
    names = {f"{type(model).__name__}.{name}": module for name, module in model.named_modules()}
    layers = {id(layer) for stack in Anatomy.of(model).stacks for layer in stack.layers}
    return sum(sum(counts.get(name, {}).values()) for name, module in names.items() if id(module) in layers) // 2


def config(**changes: Any) -> PruningConfig:
    """Choices that need no data, and nothing fitted afterwards: what is left of a unit is what it was."""
    plain = {"importance": "magnitude", "layer_importance": "magnitude", "reconstruct": False}
    return PruningConfig(**(plain | changes))


def query_heads(model: PreTrainedModel) -> int:
    return Anatomy.of(model).stacks[0].num_heads
