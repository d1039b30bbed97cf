"""`scripts/prune.py`: one pruned folder that loads, a sweep with its picture, and errors before anything is loaded."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from hf_efficient import CheckpointError, ConfigError, PruningPlan
from hf_efficient.cli.programs import prune
from hf_efficient.cli.programs.prune import parse, run
from hf_efficient.data.bundled import bundled_model
from hf_efficient.models import on_disk
from hf_efficient.pruning import search
from hf_efficient.pruning.score.units import score_units


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A tiny classifier, a tokenizer and forty texts."""
    folder = tmp_path_factory.mktemp("prune")
    tokenizer = AutoTokenizer.from_pretrained(bundled_model("minilm-l6"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [f"{word} film number {i},{i % 2}" for i, word in enumerate(["good", "bad"] * 20)]
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    own = ["--model", str(folder / "model"), "--dataset", str(folder / "rows.csv"), "--task", "text-classification"]
    return [*own, "--max_length", "16", "--batch_size", "8", "--round_to", "4"]


def test_one_ratio(flags, tmp_path):
    rows = run(parse([*flags, "--ratio", "0.5", "--output_dir", str(tmp_path / "small")]))
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert small.num_parameters() == rows[1]["parameters"] < rows[0]["parameters"]
    assert AutoTokenizer.from_pretrained(tmp_path / "small")("film")["input_ids"]
    assert PruningPlan.load(tmp_path / "small" / "plan.json").forecast.removed_macs >= 0.5
    with pytest.raises(CheckpointError, match="not empty"):
        run(parse([*flags, "--ratio", "0.5", "--output_dir", str(tmp_path / "small")]))


def test_layer_by_layer(flags, tmp_path, monkeypatch):
    usual = run(parse([*flags, "--ratio", "0.5", "--output_dir", str(tmp_path / "whole")]))
    monkeypatch.setattr(prune, "load_model", lambda *_, **__: pytest.fail("the model is loaded whole"))
    always = ["--ratio", "0.5", "--layer_by_layer", "always"]
    rows = run(parse([*flags, *always, "--output_dir", str(tmp_path / "small")]))
    assert [row["parameters"] for row in rows] == [row["parameters"] for row in usual]
    small, whole = (AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("small", "whole"))
    assert all(torch.allclose(small.state_dict()[key], value, atol=1e-4) for key, value in whole.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "small")("film")["input_ids"]
    monkeypatch.setattr(on_disk, "SHARE", 0.0)  # now every model is too large
    assert run(parse([*flags, "--ratio", "0.5", "--output_dir", str(tmp_path / "large")])) == rows


def test_a_sweep(flags, tmp_path):
    run(parse([*flags, "--sweep", "0.6", "0.3", "--output_dir", str(tmp_path / "sweep")]))
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [row["ratio"] for row in rows] == [0.0, 0.3, 0.6]
    assert all(row["removed_macs"] >= row["ratio"] for row in rows) and {row["metric"] for row in rows} == {"accuracy"}
    for picture in ("sweep.png", "importance.png"):
        assert (tmp_path / "sweep" / picture).read_bytes().startswith(b"\x89PNG")


def test_a_sweep_scores_the_dense_model_once(flags, tmp_path, monkeypatch):
    """And a ratio that cannot be reached is refused before that."""
    scored = []

    def counted(*args, **kwargs):
        scored.append(1)
        return score_units(*args, **kwargs)

    monkeypatch.setattr(search, "score_units", counted)
    with pytest.raises(ConfigError, match=r"ratio=0\.999 cannot be reached"):
        run(parse([*flags, "--sweep", "0.3", "0.999", "--output_dir", str(tmp_path / "sweep")]))
    assert not scored and not (tmp_path / "sweep").exists()
    together = run(parse([*flags, "--sweep", "0.6", "0.3", "--output_dir", str(tmp_path / "sweep")]))
    assert len(scored) == 1
    alone = run(parse([*flags, "--ratio", "0.6", "--output_dir", str(tmp_path / "alone")]))
    assert len(scored) == 2 and together[2] == alone[1]  # what came before it in the sweep changed nothing


def test_a_sweep_of_layers_has_no_units_to_draw(flags, tmp_path):
    more = ["--sweep", "0.5", "--granularity", "layer", "--importance", "block_influence"]
    run(parse([*flags, *more, "--output_dir", str(tmp_path / "sweep")]))
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["sweep.json", "sweep.png"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "Give ratio or sweep"),
        (["--ratio", "0.5", "--sweep", "0.2"], "Give ratio or sweep"),
        (["--ratio", "2"], "between 0 and 1"),
        (["--ratio", "0.5", "--importance", "fischer"], "Did you mean 'fisher'"),
        (["--ratio", "0.5", "--layer_by_layer", "yes"], "always"),
        (["--sweep", "0.5", "--layer_by_layer", "always"], "takes the whole model"),
    ],
)
def test_errors_before_anything_is_loaded(flags, more, words):
    with pytest.raises(ConfigError, match=words):
        parse(["--model", "none", "--dataset", "none", "--task", "text-classification", "--output_dir", "out", *more])
    assert flags
