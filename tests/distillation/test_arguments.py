"""What DistillationArguments accepts, and what it says otherwise."""

from dataclasses import fields

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_efficient.distillation.arguments import DistillationArguments
from hf_efficient.errors import ConfigError


def test_defaults(tmp_path):
    args = DistillationArguments(output_dir=str(tmp_path))
    assert args.losses == {"ce": 1.0, "kd": 1.0}
    assert (args.temperature, args.temperature_squared, args.divergence) == (2.0, True, "forward")


def test_a_lower_term_is_better(tmp_path):
    for metric, expected in (("eval_loss_kd", False), ("loss", False), ("eval_accuracy", True)):
        best = {"metric_for_best_model": metric, "load_best_model_at_end": True}
        args = DistillationArguments(output_dir=str(tmp_path), save_strategy="steps", eval_strategy="steps", **best)
        assert args.greater_is_better is expected


def test_the_command_line(tmp_path):
    words = ["--output_dir", str(tmp_path), "--losses", '{"kd": 2, "hidden": 0.5, "ce": 0}']
    words += ["--layer_map", "[[1, 2], [2, 4]]", "--temperature_squared", "false"]
    (args,) = HfArgumentParser(DistillationArguments).parse_args_into_dataclasses(words)
    assert args.losses == {"kd": 2.0, "hidden": 0.5}
    assert args.layer_map == [[1, 2], [2, 4]]
    assert args.temperature_squared is False


def test_every_own_field_has_help():
    inherited = {entry.name for entry in fields(TrainingArguments)}
    own = [entry for entry in fields(DistillationArguments) if entry.name not in inherited]
    assert len(own) >= 18
    assert all(field.metadata.get("help") for field in own)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"losses": {"hiden": 1}}, "Did you mean 'hidden'"),
        ({"losses": {"kd": -1}}, "from 0 up"),
        ({"losses": {"kd": float("nan")}}, "from 0 up"),
        ({"losses": {"kd": True}}, "from 0 up"),
        ({"losses": {"kd": 0}}, "nothing to train on"),
        ({"losses": {}}, "must map names"),
        ({"losses": "kd=1"}, "is not JSON"),
        ({"temperature": 0}, "above 0"),
        ({"jsd_beta": 1.0}, "between 0 and 1"),
        ({"divergence": "revers"}, "Did you mean 'reverse'"),
        ({"soft_positions": "all"}, "attended"),
        ({"hidden_loss": "l1"}, "mse"),
        ({"score_loss": "cosine"}, "Known: kl, mse"),
        ({"layer_map": "first"}, "linspace"),
        ({"layer_map": {"encoder": "first"}}, "linspace"),
        ({"layer_map": "[[1, 2]"}, "is not JSON"),
        ({"teacher_dtype": "int8"}, "bfloat16"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"torch_compile": True}, "torch_compile"),
    ],
)
def test_values_that_are_not_allowed(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        DistillationArguments(output_dir=str(tmp_path), **settings)
