"""Latency against length: every length that was asked for, both models, and nothing for images."""

import pytest

from hf_efficient import ConfigError
from hf_efficient.measurement.lengths import measure_lengths, usual_lengths

from ..families import make_model


def test_every_length_is_timed_for_both():
    model = make_model("bert")
    points = measure_lengths(model, model, [4, 16], rounds=2)
    assert [point.sequence_length for point in points] == [4, 16]
    assert all(point.student_ms > 0 and point.teacher_ms > 0 for point in points)
    assert measure_lengths(model, None, [4], rounds=2)[0].teacher_ms is None


def test_images_have_no_length():
    assert measure_lengths(make_model("vit"), None, [4], rounds=2) == ()


def test_a_length_that_the_model_does_not_take_is_an_error():
    with pytest.raises(ConfigError, match="positions"):
        measure_lengths(make_model("bert", max_position_embeddings=8), None, [9], rounds=2)


def test_usual_lengths_end_at_the_longest():
    assert usual_lengths(512) == [64, 128, 256, 512] and usual_lengths(4) == [2, 4]
