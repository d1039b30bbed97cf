"""Which teacher layer a student layer learns from."""

import pytest

from hf_efficient.distillation.layer_map import chosen_layers, depths, kept_layers, layer_pairs, width
from hf_efficient.errors import ConfigError, UnsupportedModelError

from .tiny import bert, t5


@pytest.mark.parametrize(
    ("name", "student", "teacher", "expected"),
    [
        ("uniform", 3, 12, [3, 7, 11]),
        ("uniform", 4, 6, [1, 2, 4, 5]),
        ("last", 3, 12, [9, 10, 11]),
        ("linspace", 3, 12, [0, 6, 11]),
        ("linspace", 6, 12, [0, 2, 4, 7, 9, 11]),  # DistilBERT's own choice
        ("linspace", 1, 12, [11]),
        ("uniform", 1, 12, [11]),
    ],
)
def test_known_maps(name, student, teacher, expected):
    assert chosen_layers(name, student, teacher) == expected


@pytest.mark.parametrize("name", ["uniform", "last", "linspace"])
def test_every_map_rises_and_ends_at_the_last_layer(name):
    for teacher in range(1, 25):
        for student in range(1, teacher + 1):
            chosen = chosen_layers(name, student, teacher)
            assert chosen == sorted(set(chosen)) and len(chosen) == student
            assert chosen[-1] == teacher - 1 and chosen[0] >= 0


def test_pairs():
    assert layer_pairs("uniform", 2, 4) == [(0, 0), (1, 2), (2, 4)]
    assert layer_pairs("auto", 2, 4) == layer_pairs("uniform", 2, 4)
    assert layer_pairs("auto", 2, 4, kept=[0, 3]) == [(0, 0), (1, 1), (2, 4)]
    assert layer_pairs("last", 2, 4, kept=[0, 3]) == [(1, 3), (2, 4)]
    assert layer_pairs([[1, 4], [2, 4]], 2, 4) == [(1, 4), (2, 4)]


@pytest.mark.parametrize(
    ("layer_map", "message"),
    [
        ([[1, 5]], "the teacher has the positions 0 .* to 4"),
        ([[3, 1]], "the student has the positions 0 .* to 2"),
        ([[-1, 1]], "student"),
        ([1, 2], "pairs of integers"),
        ([[True, 1]], "pairs of integers"),
        ([], "pairs of integers"),
        ("unifrom", "Did you mean 'uniform'"),
    ],
)
def test_maps_that_do_not_fit(layer_map, message):
    with pytest.raises(ConfigError, match=message):
        layer_pairs(layer_map, 2, 4)


def test_a_student_of_another_teacher():
    with pytest.raises(ConfigError, match="kept the layers"):
        layer_pairs("auto", 2, 4, kept=[0, 5])
    with pytest.raises(ConfigError, match="cannot follow"):
        layer_pairs("uniform", 5, 4)


def test_depths_and_widths():
    model = t5(layers=3)
    assert depths(model, ("encoder", "decoder")) == {"encoder": 3, "decoder": 3}
    assert width(model) == 16 and width(bert(24)) == 24
    del model.config.num_decoder_layers
    with pytest.raises(UnsupportedModelError, match="decoder_layers"):
        depths(model, ("encoder", "decoder"))


def test_the_config_remembers():
    model = bert()
    assert kept_layers(model, ("encoder",)) == {}
    model.config.efficient = {"kept_layers": {"decoder": [0, 3]}}
    assert kept_layers(model, ("encoder",)) == {"encoder": [0, 3]}
    assert kept_layers(model, ("encoder", "decoder")) == {"decoder": [0, 3]}
