"""What is said frame by frame (CTC): both losses against definitions row by row, and what cannot be compared."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset

from hf_efficient import DistillationArguments, DistillationTrainer
from hf_efficient.distillation.cache.write import cache_teacher
from hf_efficient.errors import ConfigError, DataError, UnsupportedModelError
from hf_efficient.models.frames import frames_of

from ..media import save_wav2vec


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = save_wav2vec(tmp_path_factory.mktemp("frames"))
    return transformers.Wav2Vec2ForCTC.from_pretrained(folder).double().eval()


@pytest.fixture
def student(teacher):
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(1)
    for parameter in student.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.double)
    return student


@pytest.fixture
def rows():
    """Of 43 frames together."""
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(count, generator=generator, dtype=torch.double) for count in (4000, 1900, 950)]
    return list(zip(samples, ([5, 6, 7], [8, 4, 5, 6], [9]), strict=True))


def collate(rows):
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_values": pad([samples for samples, _ in rows], True),
        "attention_mask": pad([torch.ones(len(samples), dtype=torch.long) for samples, _ in rows], True),
        "labels": pad([torch.tensor(labels) for _, labels in rows], True, -100),
    }


def trainer_of(student, teacher, folder, **losses):
    args = DistillationArguments(str(folder), losses=losses, temperature=2.0, report_to="none", use_cpu=True)
    return DistillationTrainer(student, args, teacher=teacher, data_collator=collate)


@pytest.mark.parametrize("losses", [{"kd": 1.0}, {"ce": 1.0}, {"kd": 1.0, "ce": 1.0, "hidden": 1.0}])
def test_a_batch_with_padding_is_its_rows_without(losses, student, teacher, rows, tmp_path):
    total = {name: [0.0, 0] for name in losses}
    for samples, labels in rows:
        inputs = {"input_values": samples[None], "output_hidden_states": True}
        own, other = student(**inputs, labels=torch.tensor([labels])), teacher(**inputs)
        logs = [(output.logits / 2).log_softmax(-1) for output in (own, other)]
        states = [torch.stack(output.hidden_states) for output in (own, other)]
        frames = own.logits.shape[1]
        parts = {
            "kd": (4 * F.kl_div(*logs, log_target=True, reduction="sum"), frames),
            "ce": (own.loss, len(labels)),
            "hidden": ((states[0] - states[1]).square().mean((0, 1, 3)).sum(), frames),
        }
        for name in losses:
            total[name] = [have + more for have, more in zip(total[name], parts[name], strict=True)]
    expected = sum(value / count for value, count in total.values())
    got = trainer_of(student, teacher, tmp_path, **losses).compute_loss(student, collate(rows))
    assert got.item() == pytest.approx(expected.item(), rel=1e-5) and got.requires_grad  # CTC is in float32
    assert next(count for _, count in total.values()) == (8 if "kd" not in losses else 43)


def test_a_student_comes_near_its_teacher(student, teacher, rows, tmp_path):
    trainer = trainer_of(student, teacher, tmp_path, kd=1.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    values = []
    for _ in range(20):
        loss = trainer.compute_loss(student, collate(rows))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    assert values[-1] < values[0] / 3


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("wav2vec2", {}),
        ("wav2vec2-bert", {"feature_projection_input_dim": 8, "add_adapter": True}),
        ("parakeet_ctc", {}),
        ("sew", {}),
    ],
)
def test_the_mask_is_as_long_as_the_answer(name, sizes):
    from hf_efficient.models.derive.inputs import tiny_inputs
    from hf_efficient.models.derive.tiny import tiny_config, tiny_model

    config = tiny_config(transformers.AutoConfig.for_model(name, **sizes))
    model = tiny_model(config, transformers.AutoModelForCTC._model_mapping[type(config)])
    inputs = tiny_inputs(model)
    with torch.no_grad():
        assert frames_of(model).mask(inputs).shape == model(**inputs).logits.shape[:2]


def test_what_cannot_be_compared(student, teacher, rows, tmp_path):
    other = copy.deepcopy(teacher.config)
    other.conv_stride = (10, 8)
    with pytest.raises(UnsupportedModelError, match="different numbers of frames"):
        trainer_of(transformers.Wav2Vec2ForCTC(other), teacher, tmp_path, kd=1.0)
    with pytest.raises(ConfigError, match="not cached"):
        cache_teacher(teacher, Dataset.from_list([{"input_values": [0.0] * 800}]), tmp_path / "cache")
    trainer = trainer_of(student, teacher, tmp_path, kd=1.0)
    with pytest.raises(DataError, match="labels of a batch"):
        trainer.data_collator([(rows[0][0], [11])])
