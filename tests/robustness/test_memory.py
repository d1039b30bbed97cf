"""Where memory runs out, training goes on in smaller batches, to the same weights, and says so."""

import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size

from hf_efficient import TrainingError, compress
from hf_efficient.pipeline.run import Run
from hf_efficient.training.trainers import in_smaller_batches

from .tiny import TRAINING, recipe, run_stage

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you ...")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a run whose teacher is there."""
    folder = tmp_path_factory.mktemp("whole")
    run_stage(recipe(), "teacher", folder, "0-teacher")
    return folder


@pytest.fixture(scope="module")
def whole(teacher):
    """What distillation gives where memory does not run out, and its facts."""
    facts = run_stage(recipe(), "distill", teacher, "whole")
    return weights(teacher / "whole"), facts


@pytest.fixture
def little_memory(monkeypatch):
    """`little_memory(4)`: batches of more than 4 do not fit, from a step on; the sizes that were tried are noted."""

    def limit(rows, from_step=0, error=CUDA):
        real, tried = Trainer.training_step, []

        def step(self, model, inputs, *args, **kwargs):
            tried.append((self.state.global_step, find_batch_size(inputs)))
            if find_batch_size(inputs) > rows and self.state.global_step >= from_step:
                raise error
            return real(self, model, inputs, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", step)
        return tried

    return limit


def weights(folder):
    return load_file(folder / "model.safetensors")


def largest_difference(first, second):
    return max((first[key] - second[key]).abs().max().item() for key in first)


@pytest.mark.parametrize("error", [CUDA, CPU, MemoryError()], ids=["cuda", "cpu", "python"])
def test_the_batch_shrinks_until_it_fits(error, caplog):
    tried = []

    def work(size):
        tried.append(size)
        if size > 3:
            raise error
        return "done"

    with caplog.at_level(logging.WARNING):
        assert in_smaller_batches(work, 12, seed=0) == ("done", 3)
    assert tried == [12, 6, 3]
    assert "Memory ran out with batches of 12" in caplog.text and "batches of 3, 4 of them" in caplog.text


def test_an_odd_batch_is_split_into_equal_parts():
    tried = []

    def work(size):
        tried.append(size)
        if size > 1:
            raise CPU

    assert in_smaller_batches(work, 45, seed=0) == (None, 1)
    assert tried == [45, 15, 5, 1]


def test_one_example_that_does_not_fit_is_an_error():
    def work(size):
        raise CUDA

    with pytest.raises(
        TrainingError, match=r"One example alone does not fit into memory: CUDA out of memory.*max_length"
    ):
        in_smaller_batches(work, 4, seed=0)


def test_other_errors_are_not_tried_again():
    tried = []

    def work(size):
        tried.append(size)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        in_smaller_batches(work, 4, seed=0)
    assert tried == [4]


def test_distillation_in_smaller_batches_gives_the_same_student(teacher, whole, little_memory, caplog):
    asked = recipe()
    assert "batch_size_used" not in whole[1]
    stage, split = asked.stages[1].settings, teacher / "split"
    trainer, _ = stage.distilled(Run(asked, teacher), teacher / "0-teacher", split, 4)
    trainer.model.save_pretrained(split)
    tried = little_memory(4)
    with caplog.at_level(logging.WARNING):
        facts = run_stage(asked, "distill", teacher, "retried")
    assert facts["batch_size_used"] == 4 and facts["gradient_accumulation_steps"] == 2
    assert tried[0] == (0, 8) and all(rows == 4 for _, rows in tried[1:]) and len(tried) == 1 + 2 * 8
    assert "Memory ran out with batches of 8 (CUDA out of memory." in caplog.text
    retried = weights(teacher / "retried")
    assert largest_difference(retried, weights(split)) == 0
    assert largest_difference(retried, whole[0]) < 1e-5
    assert largest_difference(retried, weights(teacher / "0-teacher")) > 1e-3


def test_it_goes_on_from_the_last_checkpoint(teacher, whole, little_memory):
    asked = recipe()
    tried = little_memory(2, from_step=6)
    facts = run_stage(asked, "distill", teacher, "late")
    assert facts["batch_size_used"] == 2 and facts["gradient_accumulation_steps"] == 4
    assert [step for step, rows in tried if rows == 2] == [4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7]
    assert largest_difference(weights(teacher / "late"), whole[0]) < 1e-5


def test_fine_tuning_in_smaller_batches_gives_the_same_teacher(teacher, tmp_path, little_memory):
    """Of a model whose head is drawn at random when it is made."""
    little_memory(4, from_step=2, error=CPU)
    facts = run_stage(recipe(), "teacher", tmp_path, "0-teacher")
    assert facts["batch_size_used"] == 4
    assert largest_difference(weights(tmp_path / "0-teacher"), weights(teacher / "0-teacher")) < 1e-5


def test_attention_transfer_in_smaller_batches(teacher, little_memory):
    stages = [{"attention": {"kind": "linear", "feature_map": "hedgehog", "transfer": TRAINING | {"epochs": 1}}}]
    asked = recipe(stages=stages)
    whole = run_stage(asked, "attention", teacher, "transfer-whole")
    little_memory(4)
    facts = run_stage(asked, "attention", teacher, "transfer")
    assert facts["batch_size_used"] == 4
    assert facts["transfer_error_after"] == pytest.approx(whole["transfer_error_after"], rel=1e-3)
    assert largest_difference(weights(teacher / "transfer"), weights(teacher / "transfer-whole")) < 1e-5


def test_the_report_says_so(tmp_path, little_memory, quick_end):
    little_memory(4)
    stages = [{"distill": {"max_steps": 1, "batch_size": 8}}]
    report = compress(
        recipe(stages=stages), output_dir=tmp_path / "out", **{"teacher.max_steps": 1, "teacher.batch_size": 4}
    )
    assert [stage.facts.get("batch_size_used") for stage in report.stages] == [None, 4]
    assert "Memory did not hold the batches of stage distill" in report.warnings[-1]
    assert "2 accumulated batches of 4" in report.warnings[-1]
    assert "accumulated batches of 4" in " ".join((tmp_path / "out/model/README.md").read_text().split())
