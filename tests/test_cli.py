"""The command line in processes of its own: what a user types and sees."""

import json
import subprocess
import sys

import pytest

from hf_efficient.cli import parse_overrides
from hf_efficient.errors import ConfigError


def _cli(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "hf_efficient.cli", *arguments], capture_output=True, text=True, check=False
    )


def test_help_names_the_commands_without_heavy_imports():
    code = (
        "import sys\nfrom hf_efficient.cli import app\nfrom typer.testing import CliRunner\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "print(result.output, sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(command in output for command in ("compress", "measure", "list", "env"))
    assert output.rstrip().endswith("[]")


def test_list_and_env_are_readable_by_machines():
    names = json.loads(_cli("list", "--json").stdout)
    assert "local" in names["attention"] and "bbc-news" in names["recipes"] and "t5" in names["families"]
    assert _cli("list", "recipes").stdout.strip() == "recipes: " + ", ".join(names["recipes"])
    facts = json.loads(_cli("env", "--json").stdout)
    assert facts["torch"] and facts["transformers"] and facts["hf_efficient"]


def test_the_listed_losses_are_those_there_are():
    from hf_efficient.distillation.terms import LOSSES

    assert json.loads(_cli("list", "losses", "--json").stdout)["losses"] == list(LOSSES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compress", "bbc-nws"), ("No such recipe", "bbc-news")),
        (("compress", "digits", "--prune.ratoi", "0.5"), ("ratoi", "Did you mean 'ratio'")),
        (("compress", "digits", "--prune.ratio", "1.5"), ("ratio", "between 0 and 1")),
        (("compress", "digits", "--prune.importance", "tayler"), ("Did you mean 'taylor'",)),
        (("compress", "digits", "extra"), ("not an option",)),
        (("list", "recipe"), ("Did you mean 'recipes'",)),
        (("compress", "--prune.ratio", "0.5", "digits"), ("recipe comes first",)),
        (("measure", "x", "--task", "clasification"), ("Known:",)),
        (("measure", "no/such/folder"), ("Cannot load",)),
    ],
)
def test_a_users_error_is_one_message_and_exit_code_1(arguments, words):
    done = _cli(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_measure_prints_a_table_and_json(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    options = ("--sequence-length", "8", "--repeats", "2")
    assert "MACs" in _cli("measure", str(tmp_path), *options).stdout
    measured = json.loads(_cli("measure", str(tmp_path), "--baseline", str(tmp_path), *options, "--json").stdout)
    assert measured["comparison"]["mac_ratio"] == 1.0


def test_overrides_take_both_spellings():
    assert parse_overrides(["--prune.ratio", "0.5", "--seed=1"]) == {"prune.ratio": "0.5", "seed": "1"}
    with pytest.raises(ConfigError, match="needs a value"):
        parse_overrides(["--prune.ratio"])


def test_prune_and_distill_are_the_scripts():
    for command, flag in (("prune", "--sweep"), ("distill", "--student_layers")):
        done = _cli(command, "--help")
        assert done.returncode == 0 and flag in done.stdout


def test_debug_shows_where_an_error_arose():
    plain, debug = _cli("compress", "bbc-nws"), _cli("--debug", "compress", "bbc-nws")
    assert plain.returncode == debug.returncode == 1
    assert "Traceback" not in plain.stderr and "Traceback" in debug.stderr and "No such recipe" in debug.stderr


def test_version_and_completion():
    import hf_efficient

    assert _cli("--version").stdout.strip() == hf_efficient.__version__
    assert "hf" in _cli("--show-completion", "bash").stdout


def test_a_result_is_shown_and_its_card_written_anew(tmp_path):
    from .reporting.samples import sample_report

    one, run = tmp_path / "one", tmp_path / "run"
    sample_report().save(one)
    sample_report().save(run / "model")
    shown = _cli("report", str(one), str(run), "--plot", str(tmp_path / "p.png"), "--page", str(tmp_path / "p.html"))
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("latency, median") == 2 and (tmp_path / "p.png").stat().st_size > 1000
    assert "2 results" in (tmp_path / "p.html").read_text()
    assert len(json.loads(_cli("report", str(one), str(run), "--json").stdout)) == 2
    assert _cli("card", str(run), "--repo-id", "me/fast").returncode == 0
    assert "# fast" in (run / "model" / "README.md").read_text()
    assert (
        "# fast" in _cli("card", str(one), "--repo-id", "me/fast", "--print").stdout
        and not (one / "README.md").exists()
    )
    missing = _cli("report", str(tmp_path))
    assert missing.returncode == 1 and "No readable report" in missing.stderr


def test_a_run_goes_on_by_its_folder(tmp_path):
    from hf_efficient import Recipe

    from .test_pipeline import TINY

    fresh = _cli("compress", "digits", "--output-dir", str(tmp_path / "none"), "--resume")
    assert fresh.returncode == 1 and "no run" in fresh.stderr and not (tmp_path / "none").exists()
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(Recipe.from_dict(TINY | {"teacher": {"max_steps": 1}, "stages": []}).to_yaml())
    folder = str(tmp_path / "out")
    assert _cli("compress", str(recipe), "--output-dir", folder).returncode == 0
    (tmp_path / "out" / "model").rename(tmp_path / "away")
    again = _cli("compress", folder, "--resume", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["recipe"]["name"] == "tiny" and (tmp_path / "out" / "model").is_dir()
    other = _cli("compress", folder, "--seed", "3")
    assert other.returncode == 1 and "Leave out the overrides" in other.stderr
