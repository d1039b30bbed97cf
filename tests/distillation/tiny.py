"""Tiny student and teacher pairs of all kinds of tasks with ragged data, made from a seed in milliseconds."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_efficient.distillation.arguments import DistillationArguments
from hf_efficient.distillation.terms import LOSSES

VOCABULARY = 40
LABELS = 3
PAD = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "labels": -100}

Example = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """make(hidden, layers) gives a model without dropout, example(generator) one unpadded example."""

    make: Callable[[int, int], PreTrainedModel]
    example: Callable[[torch.Generator], Example]


def bert(
    hidden: int = 16, layers: int = 2, *, head: type[PreTrainedModel] = BertForSequenceClassification, **config: Any
) -> PreTrainedModel:
    settings = {"num_labels": LABELS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | config
    return head(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=2 * hidden,
            max_position_embeddings=32,
            **settings,
        )
    )


def bert_pool(hidden: int = 16, layers: int = 2) -> PreTrainedModel:
    return bert(hidden, layers, head=partial(BertModel, add_pooling_layer=False))


def llama(hidden: int = 16, layers: int = 2) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=2 * hidden,
            max_position_embeddings=32,
            pad_token_id=0,
        )
    )


def t5(hidden: int = 16, layers: int = 2) -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=hidden,
            d_kv=8,
            num_heads=2,
            num_layers=layers,
            num_decoder_layers=layers,
            d_ff=2 * hidden,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


def vit(hidden: int = 16, layers: int = 2) -> PreTrainedModel:
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=2 * hidden,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=LABELS,
        )
    )


def _tokens(generator: torch.Generator, low: int = 3, high: int = 12) -> list[int]:
    length = int(torch.randint(low, high, (), generator=generator))
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


def _label(generator: torch.Generator) -> int:
    return int(torch.randint(0, LABELS, (), generator=generator))


def text_example(generator: torch.Generator) -> Example:
    return {"input_ids": _tokens(generator), "labels": _label(generator)}


def token_example(generator: torch.Generator) -> Example:
    tokens = _tokens(generator)
    labels = torch.randint(-1, LABELS, (len(tokens),), generator=generator)
    return {"input_ids": tokens, "labels": labels.where(labels >= 0, -100).tolist()}


def masked_example(generator: torch.Generator) -> Example:
    """Every third token has to be guessed."""
    tokens = _tokens(generator)
    return {
        "input_ids": [1 if i % 3 == 0 else token for i, token in enumerate(tokens)],
        "labels": [token if i % 3 == 0 else -100 for i, token in enumerate(tokens)],
    }


def span_example(generator: torch.Generator) -> Example:
    """The last position may lie behind the text: such an answer does not count."""
    tokens = _tokens(generator)
    first, last = sorted(torch.randint(0, len(tokens), (2,), generator=generator).tolist())
    is_cut = int(torch.randint(0, 4, (), generator=generator)) == 0
    return {"input_ids": tokens, "start_positions": first, "end_positions": 100 if is_cut else last}


def unlabelled_example(generator: torch.Generator) -> Example:
    return {"input_ids": _tokens(generator)}


def causal_example(generator: torch.Generator) -> Example:
    """The first tokens are a prompt, which is not trained on."""
    tokens = _tokens(generator)
    prompt = int(torch.randint(0, len(tokens), (), generator=generator))
    return {"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:]}


def seq2seq_example(generator: torch.Generator) -> Example:
    return {"input_ids": _tokens(generator), "labels": _tokens(generator)}


def image_example(generator: torch.Generator) -> Example:
    return {
        "pixel_values": torch.randn(3, 8, 8, generator=generator, dtype=torch.float64),
        "labels": _label(generator),
    }


CASES: dict[str, Case] = {
    "bert": Case(bert, text_example),
    "token": Case(partial(bert, head=BertForTokenClassification), token_example),
    "masked": Case(partial(bert, head=BertForMaskedLM), masked_example),
    "span": Case(partial(bert, head=BertForQuestionAnswering, num_labels=2), span_example),
    "embedding": Case(bert_pool, unlabelled_example),
    "llama": Case(llama, causal_example),
    "t5": Case(t5, seq2seq_example),
    "vit": Case(vit, image_example),
}


ARCHITECTURES = ("bert", "llama", "t5", "vit")
HEADLESS = ("embedding",)
WITH_HEAD = tuple(case for case in CASES if case not in HEADLESS)


def losses_of(case: str) -> tuple[str, ...]:
    """The names of the table that this case can be trained on."""
    return tuple(
        name for name, loss in LOSSES.items() if (not loss.needs_head if case in HEADLESS else name != "embedding")
    )


def examples(case: str, count: int = 16, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    return [CASES[case].example(generator) for _ in range(count)]


def collate(rows: list[Example]) -> dict[str, torch.Tensor]:
    """Pad on the right to the longest row."""
    rows = [row | {"attention_mask": [1] * len(row["input_ids"])} if "input_ids" in row else row for row in rows]
    return {name: _stack([row[name] for row in rows], PAD.get(name, 0)) for name in rows[0]}


def _stack(values: list, padding: int) -> torch.Tensor:
    if torch.is_tensor(values[0]):
        return torch.stack(values)
    if not isinstance(values[0], list):
        return torch.tensor(values)
    longest = max(map(len, values))
    return torch.tensor([value + [padding] * (longest - len(value)) for value in values])


def make_pair(case: str, *, seed: int = 0, teacher_hidden: int = 24) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student of 2 layers and a wider teacher of 4, in float64, with weights large enough to have an opinion."""
    torch.manual_seed(seed)
    student, teacher = CASES[case].make(16, 2).double(), CASES[case].make(teacher_hidden, 4).double()
    for model in (student, teacher):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return student, teacher


def with_adapters(model: PreTrainedModel) -> PeftModel:
    """LoRA that has learned something already."""
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["query"], r=2)).double()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return wrapped


def arguments(folder: Any, **settings: Any) -> DistillationArguments:
    """Quiet CPU settings: one step of plain SGD on 16 examples unless told otherwise."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 8,
        "max_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return DistillationArguments(output_dir=str(folder), **(defaults | settings))
