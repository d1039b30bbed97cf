"""Students cut from their teacher."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from hf_efficient.distillation.student import build_student
from hf_efficient.errors import ConfigError, UnsupportedModelError
from hf_efficient.models.anatomy import Anatomy

from .tiny import ARCHITECTURES, collate, examples, make_pair
from .training import make_trainer


def layers_of(model, stack="encoder"):
    base = model.base_model
    paths = {"bert": "encoder.layer", "vit": "layers", "llama": "layers", "t5": f"{stack}.block"}
    return base.get_submodule(paths[model.config.model_type])


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_the_student_has_the_weights_of_the_kept_layers(case):
    _, teacher = make_pair(case)
    student = build_student(teacher, layers=2)
    assert type(student) is type(teacher)
    for new, old in enumerate([0, 3]):
        expected, got = layers_of(teacher)[old].state_dict(), layers_of(student)[new].state_dict()
        assert all(torch.equal(got[key], expected[key]) for key in got)
    outside = [key for key in student.state_dict() if not any(part.isdigit() for part in key.split("."))]
    assert outside and all(torch.equal(student.state_dict()[key], teacher.state_dict()[key]) for key in outside)
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_all_layers_give_the_same_outputs_and_fewer_do_not(case):
    _, teacher = make_pair(case)
    batch = collate(examples(case))
    expected = teacher.eval()(**batch).logits
    assert torch.equal(build_student(teacher, layers=4).eval()(**batch).logits, expected)
    assert not torch.allclose(build_student(teacher, layers=3).eval()(**batch).logits, expected)


@pytest.mark.parametrize(
    ("layers", "layer_map", "kept"),
    [(2, "uniform", [1, 3]), (2, "last", [2, 3]), (1, "linspace", [3]), ([0, 2], "linspace", [0, 2])],
)
def test_which_layers(layers, layer_map, kept):
    _, teacher = make_pair("llama")
    student = build_student(teacher, layers, layer_map=layer_map)
    assert student.config.num_hidden_layers == len(kept)
    assert student.config.efficient["kept_layers"] == {"decoder": kept}


def test_encoder_and_decoder_apart():
    _, teacher = make_pair("t5")
    student = build_student(teacher, {"decoder": [1, 3]})
    assert (len(layers_of(student)), len(layers_of(student, "decoder"))) == (4, 2)
    assert student.config.efficient["kept_layers"] == {"encoder": [0, 1, 2, 3], "decoder": [1, 3]}
    bias = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"  # stays in the first layer
    assert torch.equal(student.state_dict()[bias], teacher.state_dict()[bias])


def test_saved_and_loaded_without_us(tmp_path):
    _, teacher = make_pair("bert")
    student = build_student(teacher, layers=[0, 3])
    student.save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert type(loaded) is BertForSequenceClassification
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.efficient["kept_layers"] == {"encoder": [0, 3]}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_the_layer_map_follows_the_kept_layers(case, tmp_path):
    _, teacher = make_pair(case)
    student = build_student(teacher, layers=[0, 3])
    trainer = make_trainer(case, tmp_path, pair=(student, teacher), losses={"hidden": 1.0})
    assert all(pairs == [(0, 0), (1, 1), (2, 4)] for pairs in trainer.pairs["hidden"].values())
    assert len(trainer.pairs["hidden"]) == (2 if case == "t5" else 1)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (0, "1 to 4"),
        (5, "1 to 4"),
        ([3, 0], "rising order"),
        ([0, 4], "rising order"),
        ([0, 0], "rising order"),
        ([], "rising order"),
        (True, "rising order"),
        ({"decoder": 2}, "Known: encoder"),
    ],
)
def test_layers_that_the_teacher_does_not_have(layers, message):
    with pytest.raises(ConfigError, match=message):
        build_student(make_pair("bert")[1], layers)


def test_other_errors():
    _, teacher = make_pair("bert")
    with pytest.raises(ConfigError, match="linspace"):
        build_student(teacher, 2, layer_map="auto")
    with pytest.raises(UnsupportedModelError, match="transformers model"):
        build_student(torch.nn.Linear(2, 2), 1)


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_a_narrower_student_keeps_the_heads_and_neurons_with_the_largest_weights(case, tmp_path):
    _, teacher = make_pair(case)
    groups = {group.name: group for group in Anatomy.of(teacher).groups}
    chosen = {}
    with torch.no_grad():
        for name, group in groups.items():
            count = 1 if "heads" in name else 8
            order = torch.randperm(group.units, generator=torch.Generator().manual_seed(0))
            chosen[name] = set(order[:count].tolist())
            for member in group.members:
                output = teacher.get_parameter(f"{member.prefix}.{member.output.name}")
                for unit in chosen[name]:
                    output.index_fill_(
                        member.output.dim, member.output.rows(torch.tensor([unit]), output), 10.0 + unit
                    )
    student = build_student(teacher, layers=2, heads=1, neurons=8)
    sizes = {(group.kind, group.units) for group in Anatomy.of(student).groups}
    assert {kind for kind, _ in sizes} <= {"heads", "cross_heads", "neurons"}
    assert all(units == (8 if kind == "neurons" else 1) for kind, units in sizes)
    for new, old in zip(Anatomy.of(student).groups, _groups_of_kept(teacher), strict=True):
        for own, other in zip(new.members, old.members, strict=False):
            got = student.get_parameter(f"{own.prefix}.{own.output.name}")
            whole = teacher.get_parameter(f"{other.prefix}.{other.output.name}")
            rows = other.output.rows(torch.tensor(sorted(chosen[old.name])), whole)
            assert torch.equal(got, whole.index_select(other.output.dim, rows))
    trainer = make_trainer(case, tmp_path, pair=(student, teacher), losses={"kd": 1.0, "hidden": 1.0}, max_steps=2)
    assert not trainer.projections
    trainer.train()
    student.save_pretrained(tmp_path / "student")
    again = type(student).from_pretrained(tmp_path / "student", dtype=torch.float64).eval()
    batch = collate(examples(case))
    assert torch.equal(again(**batch).logits, student.eval()(**batch).logits)


def _groups_of_kept(teacher):
    """The first and the last layer's; T5's heads are one group of all layers."""
    return [group for group in Anatomy.of(teacher).groups if set(group.layers) & {0, 3}]


def test_narrow_in_all_layers_and_wrong_widths():
    _, teacher = make_pair("bert")
    student = build_student(teacher, neurons=8)
    assert student.config.num_hidden_layers == 4
    assert {group.units for group in Anatomy.of(student).groups if group.kind == "neurons"} == {8}
    for settings in ({"heads": 3}, {"heads": 0}, {"neurons": 49}, {"neurons": True}):
        with pytest.raises(ConfigError, match="must be from 1 to"):
            build_student(teacher, layers=2, **settings)
