"""The last stages of a recipe: the result in fewer bits, and for other runtimes."""

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_efficient import ConfigError, Recipe, compress, load_report
from hf_efficient.pipeline.compress import plan_recipe

from .tiny import TINY, make_bert, text_recipe

pytestmark = pytest.mark.usefixtures("quick_end")


def test_quantised_or_exported_the_result_says_how_it_does(tmp_path, rows):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("torchao")
    model = {"config": TINY["model"]["config"] | {"num_hidden_layers": 1}}
    short = TINY | {"model": model, "teacher": {"max_steps": 4}}
    short |= {"stages": [{"prune": {"ratio": 0.3, "calibration_samples": 32}}]}
    exports = [{"export": {"format": "onnx"}}, {"export": {"format": "onnx", "quantize": "int8"}}]
    done = compress(Recipe.from_dict(short | {"stages": short["stages"] + exports}), output_dir=tmp_path / "exported")
    assert [(each.folder, each.quantize) for each in done.exports] == [("onnx", None), ("onnx-int8", "int8")]
    plain, rounded = done.exports
    assert plain.difference < 1e-4 < rounded.difference and plain.quality.main.value == done.student.quality.main.value
    assert plain.quality_difference == done.comparison.quality_difference
    assert plain.latency.rounds == TINY["measure"]["repeats"] and plain.speedup > 0
    model = tmp_path / "exported" / "model"
    teachers = tmp_path / "exported" / "teacher-exports"
    assert sorted(each.name for each in teachers.iterdir()) == ["onnx", "onnx-int8"]
    assert not (model / teachers.name).exists()
    assert plain.teacher.score == done.teacher.quality.main.value and plain.teacher.speedup > 0
    assert plain.teacher.bytes_on_disk > plain.bytes_on_disk and rounded.teacher.bytes_on_disk > rounded.bytes_on_disk
    assert load_report(model) == done
    card = (model / "README.md").read_text()
    assert "## In other runtimes" in card and 'subfolder="onnx"' in card
    from transformers.exporters import ExportedModel

    pixels = torch.rand(3, 1, 8, 8)
    student = AutoModelForImageClassification.from_pretrained(model)
    with torch.no_grad():
        expected = student(pixels).logits
        assert torch.allclose(
            ExportedModel.from_pretrained(model, subfolder="onnx")(pixel_values=pixels).logits, expected, atol=1e-4
        )
    eight = compress(
        Recipe.from_dict(short | {"stages": short["stages"] + [{"quantize": {"method": "int8"}}]}),
        output_dir=tmp_path / "quantised",
    )
    assert eight.student.size.weight_bytes < done.student.size.weight_bytes and not eight.exports
    assert "pip install torchao" in (tmp_path / "quantised" / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{"prune": {"ratio": 0.3, "granularity": ["neuron"]}}], r"round_to=8.*group_size=16.*Set round_to to 16"),
        ([{"prune": {"ratio": 0.2, "granularity": ["neuron"], "round_to": 12}}], "Set round_to to 48"),
        ([{"prune": {"ratio": 0.3, "round_to": 16}}], r"heads, of \d+ inputs each.*leave head out of granularity"),
        ([{"distill": {"prune": {"ratio": 0.2, "granularity": ["neuron"]}}}], r"Set round_to to 16"),
        ([], r"does not divide the \d+ inputs"),
    ],
)
def test_four_bits_that_pruning_leaves_no_room_for_are_refused_before_any_work(rows, tmp_path, stages, words):
    pytest.importorskip("torchao")
    size = 16 if stages else 48
    recipe = text_recipe(
        make_bert(tmp_path / "bert"), rows, stages=[*stages, {"quantize": {"method": "int4", "group_size": size}}]
    )
    for work in (lambda: compress(recipe, output_dir=tmp_path / "out"), lambda: plan_recipe(recipe)):
        with pytest.raises(ConfigError, match=words):
            work()
    assert not (tmp_path / "out").exists()


def test_four_bits_of_what_fits(rows, tmp_path):
    pytest.importorskip("torchao")
    fits = [{"prune": {"ratio": 0.1, "granularity": ["neuron"], "round_to": 16}}]
    bert = make_bert(tmp_path / "bert")
    recipe = text_recipe(bert, rows, stages=[*fits, {"quantize": {"method": "int4", "group_size": 16}}])
    assert all(row.neurons % 16 == 0 for row in plan_recipe(recipe)[0].forecast.layers)
    eight = text_recipe(bert, rows, stages=[{"prune": {"ratio": 0.1}}, {"quantize": {"method": "int8"}}])
    assert len(plan_recipe(eight)) == 1
