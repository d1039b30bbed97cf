"""What many tests train: a trainer of a tiny case, and its weights in one vector."""

import torch

from hf_efficient.distillation.trainer import DistillationTrainer

from .tiny import arguments, collate, examples, make_pair

ALL = {"ce": 1.0, "kd": 1.0, "hidden": 1.0}


def make_trainer(case, folder, *, pair=None, rows=None, callbacks=None, **settings):
    student, teacher = pair or make_pair(case)
    return DistillationTrainer(
        student,
        arguments(folder, **settings),
        teacher=teacher,
        train_dataset=examples(case) if rows is None else rows,
        eval_dataset=examples(case, 11, seed=1),
        data_collator=collate,
        callbacks=callbacks,
    )


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def trained(case, folder, **settings):
    trainer = make_trainer(case, folder, **settings)
    trainer.train()
    return weights(trainer.model)
