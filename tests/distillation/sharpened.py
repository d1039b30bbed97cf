"""An attention kind whose learned parts are known: softmax attention, sharpened. And its training."""

import torch
from torch import nn
from transformers import TrainingArguments

from hf_efficient import AttentionConfig, convert_attention
from hf_efficient.attention.dispatch import ATTACHED
from hf_efficient.attention.engines.parts import full_attention
from hf_efficient.attention.variant import AttentionVariant
from hf_efficient.distillation.transfer import (
    TransferTrainer,
)

from ..families import CASES, make_model

KIND = "sharpened"  # softmax attention with queries times exp(sharpness): equal to it where the learned part is 0
START = 0.7


class Sharpened(AttentionVariant):
    takes_bias = takes_cross = True

    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.sharpness = nn.Parameter(torch.empty(shape.heads))

    def reset_parameters(self):
        nn.init.constant_(self.sharpness, START)

    def attend(self, query, key, value, key_mask, **kwargs):
        return full_attention(query * self.sharpness.exp()[:, None, None], key, value, key_mask, **kwargs)

    def macs(self, length, causal):
        return 2 * length * self.shape.dim


def converted(name="bert", config=None, dtype=torch.float64, **fields):
    """A model of random weights, the same at every call, whose attention is far enough from uniform to be learned."""
    torch.manual_seed(1)
    model = make_model(name, **fields).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and parameter.requires_grad:
                parameter.mul_(3)
    return convert_attention(model, config or AttentionConfig(KIND))


def family_rows(name, count=16, dtype=torch.float64):
    """Examples as the inputs of any family, every other one padded where they can be."""
    torch.manual_seed(3)
    sides = [None, CASES[name].paddings[0]] * (count // 2)
    made = [{key: value[0] for key, value in CASES[name].inputs(side).items()} for side in sides]
    return [{key: v.to(dtype) if v.is_floating_point() else v for key, v in row.items()} for row in made]


def rows(name="bert", count=16):
    """Texts of different lengths, without labels where the model needs none."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(count):
        length = int(torch.randint(3, 12, (), generator=generator))
        made.append({"input_ids": torch.randint(3, 50, (length,), generator=generator)})
        if name == "t5":
            made[-1]["labels"] = torch.randint(3, 50, (length // 2 + 1,), generator=generator)
    return made


def collate(examples):
    """Pads to the longest row, labels with -100."""
    if "attention_mask" in examples[0] or "input_ids" not in examples[0]:
        return {name: torch.stack([row[name] for row in examples]) for name in examples[0]}
    pads = {"input_ids": 0, "labels": -100}
    batch = {
        name: nn.utils.rnn.pad_sequence([row[name] for row in examples], True, pads[name]) for name in examples[0]
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in examples])
    return batch | {"attention_mask": (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()}


def arguments(folder, **settings):
    own = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 5, "max_steps": 60, "learning_rate": 0.05}
    own |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "logging_steps": 1, "disable_tqdm": True}
    return TrainingArguments(str(folder), **own | {"dataloader_pin_memory": False} | settings)


def make_trainer(name, folder, model=None, examples=None, **settings):
    examples = (rows(name) if name in ("bert", "t5") else family_rows(name)) if examples is None else examples
    model = converted(name) if model is None else model
    return TransferTrainer(
        model, arguments(folder, **settings), train_dataset=examples, eval_dataset=examples[:11], data_collator=collate
    )


def learned(model):
    return {key: value for key, value in model.state_dict().items() if ATTACHED in key}
