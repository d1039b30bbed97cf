"""Students with a narrower stream."""

import pytest
import torch

from hf_efficient.distillation import narrow
from hf_efficient.distillation.student import build_student
from hf_efficient.errors import ConfigError, DataError, UnsupportedModelError
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.rebuild import is_portable

from ..families import make_inputs, make_model
from .tiny import collate, examples, make_pair
from .training import make_trainer

NARROWED = ("bert", "roberta", "distilbert", "modernbert", "vit", "llama", "qwen3", "gpt2", "t5", "bart")
FULL, SMALL = 16, 8


def stream_axes(model):
    """By the smaller model itself, of heads that are as many as shall stay."""
    small = build_student(model, heads=narrow.heads_for(Anatomy.of(model), SMALL, None))
    return small, narrow._stream_axes(small, narrow._narrow_config(Anatomy.of(small), SMALL), FULL, SMALL)


def scale_dimensions(model, dimensions, factor):
    """Multiply all that reads or writes these dimensions of the stream; heads stay as they are."""
    _, axes = stream_axes(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for axis in axes.get(name, ()):
                parameter.movedim(axis, 0)[dimensions] *= factor


@pytest.mark.parametrize("with_data", [False, True], ids=["weights", "activations"])
@pytest.mark.parametrize("name", NARROWED)
def test_the_student_is_a_stock_model_of_that_width(name, with_data, tmp_path):
    model, inputs = make_model(name), make_inputs(name)
    settings = {"calibration": [inputs]} if with_data else {}
    assert torch.equal(build_student(model, hidden_size=FULL, **settings)(**inputs)[0], model(**inputs)[0])
    student = build_student(model, layers=2, hidden_size=SMALL, **settings)
    assert type(student) is type(model) and is_portable(student)
    for stack in Anatomy.of(student).stacks:
        dense = Anatomy.of(model).stack(stack.name)
        assert (stack.width, len(stack.layers)) == (SMALL, 2)
        assert (stack.head_width, stack.num_neurons) == (dense.head_width, dense.num_neurons)
        assert stack.num_heads == (dense.num_heads if stack.entry.head_dim else dense.num_heads * SMALL // FULL)
    student.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(again(**inputs)[0], student(**inputs)[0])


@pytest.mark.parametrize("with_data", [False, True], ids=["weights", "activations"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_the_dimensions_that_matter_stay(name, with_data):
    model = make_model(name)
    inputs = make_inputs(name)
    weak = torch.randperm(FULL)[: FULL - SMALL]
    strong = sorted(set(range(FULL)) - set(weak.tolist()))
    scale_dimensions(model, weak, 0.1)
    student = build_student(model, hidden_size=SMALL, calibration=[inputs] if with_data else None)
    kept = model.get_input_embeddings().weight[:, strong]
    assert torch.equal(student.get_input_embeddings().weight, kept)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_dimensions_that_are_always_zero_can_go(name):
    """Exactly, with data: the norms divide by the root mean square of fewer numbers, and are scaled back."""
    model = make_model(name, rms_norm_eps=1e-14)
    inputs = make_inputs(name)
    scale_dimensions(model, torch.randperm(FULL)[: FULL - SMALL], 0.0)
    expected = model(**inputs).logits
    got = build_student(model, hidden_size=SMALL, calibration=[inputs])(**inputs).logits
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
    without = build_student(model, hidden_size=SMALL)(**inputs).logits
    assert (without - expected).norm() > 100 * (got - expected).norm()


@pytest.mark.parametrize("name", ["bert", "modernbert", "vit", "gpt2", "t5", "bart"])
def test_the_unimportant_ones_do_less_harm(name, monkeypatch):
    model = make_model(name).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in make_inputs(name).items()}
    scale_dimensions(model, torch.randperm(FULL)[: FULL - SMALL], 0.05)
    model = stream_axes(model)[0].eval()  # of as many heads as stay: only the stream is compared
    expected = model(**inputs)[0]

    def error():
        return (narrow.narrow(model, SMALL, [inputs])(**inputs)[0] - expected).norm()

    best, scores = error(), narrow._by_activations
    monkeypatch.setattr(narrow, "_by_activations", lambda *args: -scores(*args))
    assert best < 0.8 * error()


def test_padding_is_not_counted():
    model, inputs = make_model("bert"), make_inputs("bert", padding="right")
    junk = inputs | {"input_ids": torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 7)}
    one, two = (build_student(model, hidden_size=SMALL, calibration=[batch]) for batch in (inputs, junk))
    assert not torch.equal(inputs["input_ids"], junk["input_ids"])
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("case", ["bert", "llama", "t5", "vit"])
def test_it_learns_through_projections(case, tmp_path):
    _, teacher = make_pair(case)
    student = build_student(teacher, layers=2, hidden_size=12)
    settings = {"losses": {"kd": 1.0, "hidden": 1.0}, "max_steps": 8, "learning_rate": 0.02}
    trainer = make_trainer(case, tmp_path, pair=(student, teacher), **settings)
    assert len(trainer.projections) == (6 if case == "t5" else 3)
    assert all(pairs == [(0, 0), (1, 1), (2, 4)] for pairs in trainer.pairs["hidden"].values())
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss_hidden"] < before["eval_loss_hidden"]
    assert after["eval_loss"] < before["eval_loss"]


def test_heads_and_neurons_are_narrowed_beside_it():
    model = make_model("llama")
    student = build_student(model, layers=2, heads=1, neurons=24, hidden_size=SMALL)
    sizes = {(group.kind, group.units) for group in Anatomy.of(student).groups}
    assert sizes == {("heads", 1), ("neurons", 24)} and is_portable(student)
    assert student.config.head_dim == 4 and student.config.num_attention_heads == 2


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bert", {"hidden_size": 10}, "multiple of 4 up to 16"),
        ("bert", {"hidden_size": 8, "heads": 3}, "hidden_size / 4"),
        ("bert", {"hidden_size": 0}, "from 1 to 16"),
        ("bert", {"hidden_size": 20}, "from 1 to 16"),
        ("bert", {"hidden_size": True}, "from 1 to 16"),
        ("llama", {"hidden_size": 10}, "multiple of the number of query heads, 4"),
    ],
)
def test_widths_that_the_config_cannot_say(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        build_student(make_model(name), **settings)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip", "widths of their own"),
        ("marian", "a formula"),
        ("dinov2", "mlp.fc1.weight"),
        ("electra", "embeddings"),
    ],
)
def test_models_whose_width_is_fixed(name, message):
    with pytest.raises(UnsupportedModelError, match=message):
        build_student(make_model(name), hidden_size=SMALL)  # ELECTRA has embeddings of that width


def test_one_batch_is_no_list_of_batches():
    with pytest.raises(DataError, match="Put it in a list"):
        build_student(make_model("bert"), hidden_size=SMALL, calibration=make_inputs("bert"))


def test_with_data_units_are_chosen_by_what_they_do():
    """A neuron with large weights that is never active: kept by its weights, dropped by its activations."""
    _, teacher = make_pair("bert")
    layer = teacher.bert.encoder.layer[0]
    with torch.no_grad():
        layer.intermediate.dense.weight[5] = 0
        layer.intermediate.dense.bias[5] = -50
        layer.output.dense.weight[:, 5] = 30
    batches = [collate(examples("bert"))]
    for calibration, is_kept in ((None, True), (batches, False)):
        student = build_student(teacher, neurons=8, calibration=calibration)
        assert bool((student.bert.encoder.layer[0].intermediate.dense.bias == -50).any()) is is_kept
