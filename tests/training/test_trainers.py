"""A resumed run has the weights that were saved, also where transformers saves them under other names."""

import copy

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_efficient import AttentionConfig, convert_attention
from hf_efficient.training.trainers import ExactTrainer

ROWS = [{"pixel_values": torch.randn(1, 4, 4, generator=torch.manual_seed(i)), "labels": i % 2} for i in range(8)]


def _model(efficient: bool):
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(1)
    model = ViTForImageClassification(ViTConfig(image_size=4, patch_size=2, num_channels=1, **sizes))
    return convert_attention(model, AttentionConfig("local", window=2)) if efficient else model


def _train(kind, folder, resume: bool = False, efficient: bool = False, **options):
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=0.1,
        save_steps=2,
        report_to="none",
        lr_scheduler_type="constant",
        **options,
    )
    trainer = kind(model=_model(efficient), args=arguments, train_dataset=ROWS, eval_dataset=ROWS)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return trainer.model.state_dict()


@pytest.mark.parametrize("efficient", [False, True])
def test_a_resumed_run_equals_the_straight_one(tmp_path, efficient):
    straight = _train(ExactTrainer, tmp_path, efficient=efficient)
    resumed = _train(ExactTrainer, tmp_path, resume=True, efficient=efficient)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_the_stock_trainer_does_not(tmp_path):
    """Why ExactTrainer is needed; when this fails, transformers has mended it and the class can go."""
    straight = _train(Trainer, tmp_path)
    resumed = _train(Trainer, tmp_path, resume=True)
    assert not all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_the_best_model_is_loaded_whole(tmp_path):
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    best = _train(ExactTrainer, tmp_path, metric_for_best_model="loss", greater_is_better=True, **options)
    names = {folder.name for folder in tmp_path.glob("checkpoint-*")}
    saved = [ViTForImageClassification.from_pretrained(tmp_path / name).state_dict() for name in names]
    assert any(all(torch.equal(best[key], state[key]) for key in best) for state in saved)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_loss_of_the_models_own_is_of_real_tokens(side, tmp_path):
    """The loss and the gradient of a step are those of the rows without padding, on either side and accumulated or
    not; of the stock trainer only where rows are padded on the right."""
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=16, pad_token_id=0)).double()
    rows = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14, 3], [4, 5, 9, 8]]

    def collate(chosen):
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        for ids in (row["input_ids"] for row in chosen):
            for name, value, padding in (("input_ids", ids, 0), ("attention_mask", [1] * len(ids), 0)):
                spare = [padding] * (8 - len(ids))
                batch[name].append(spare + value if side == "left" else value + spare)
            spare = [-100] * (8 - len(ids))
            batch["labels"].append(spare + ids if side == "left" else ids + spare)
        return {name: torch.tensor(value) for name, value in batch.items()}

    own, counted = copy.deepcopy(model), 0
    for ids in rows:
        loss = own(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
        (loss * (len(ids) - 1) / 11).backward()
        counted += loss.item() * (len(ids) - 1) / 11
    expected = torch.cat([p.grad.flatten() for p in own.parameters()])

    def first_step(kind, size):
        settings = {"gradient_accumulation_steps": 4 // size, "max_grad_norm": 0.0, "optim": "sgd"}
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            logging_steps=1,
            per_device_train_batch_size=size,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            **settings,
        )
        data = [{"input_ids": ids} for ids in rows]
        trainer = kind(copy.deepcopy(model), arguments, train_dataset=data, data_collator=collate)
        trainer.train()
        pairs = zip(model.parameters(), trainer.model.parameters(), strict=True)
        return torch.cat([((a - b) / 0.1).detach().flatten() for a, b in pairs]), trainer

    for size in (4, 2):
        gradient, trainer = first_step(ExactTrainer, size)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(counted, rel=1e-5)
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)  # Llama casts its logits to float32
    assert torch.allclose(first_step(Trainer, 4)[0], expected, rtol=1e-4, atol=1e-6) == (side == "right")
