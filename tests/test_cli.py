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
