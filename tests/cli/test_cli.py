"""The command line: what a user types and sees. Most of it runs in this process; what an import costs does not."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from hf_efficient import Recipe
from hf_efficient.cli import app, base, parse_overrides
from hf_efficient.errors import ConfigError, HfEfficientError, RequirementError

from ..commands import cli
from ..families import make_model
from ..pipeline.tiny import TINY
from ..reporting.samples import sample_report


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "hf_efficient.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What the mistakes below are made with."""
    folder = tmp_path_factory.mktemp("place")
    make_model("bert").save_pretrained(folder / "tiny")
    sample_report().save(folder / "result")
    for name in ("full", "broken", "badresult"):
        (folder / name).mkdir()
    (folder / "full" / "x.txt").write_text("x")
    (folder / "file").write_text("x")
    (folder / "broken" / "config.json").write_text("{")
    (folder / "badresult" / "report.json").write_text("{}")
    make_model("bert").save_pretrained(folder / "cut")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (folder / "bad.yaml").write_text("name: [\n")
    (folder / "rows.csv").write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(12)))
    (folder / "empty.csv").write_text("text,label\n")
    head = "name: c\ntask: text-classification\nmodel: {name_or_path: ./tiny}\nteacher: {max_steps: 1}\n"
    (folder / "column.yaml").write_text(head + "data: {name_or_path: rows.csv, text_column: txt}\n")
    (folder / "good.yaml").write_text(head + "data: {name_or_path: rows.csv, max_length: 16}\n")
    rounds = "stages: [{prune: {ratio: 0.3}}, {distill: {epochs: 1}}, {prune: {ratio: 0.3}}]\n"
    (folder / "rounds.yaml").write_text(head + "data: {name_or_path: rows.csv, max_length: 16}\n" + rounds)
    (folder / "nodata.yaml").write_text(head + "data: {name_or_path: row.csv}\n")
    return folder


def test_help_names_the_commands_without_heavy_imports():
    code = (
        "import sys\nfrom hf_efficient.cli import app\nfrom typer.testing import CliRunner\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'yaml', 'jinja2', 'rich'}\n"
        "print(result.output, sorted(heavy & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f" {command} " in output for command in base.ORDER)
    assert output.rstrip().endswith("[]") and "..." not in output.replace("[ARGS]...", "")  # nothing cut off


def test_all_commands_are_listed():
    assert sorted(each.name or each.callback.__name__ for each in app.registered_commands) == sorted(base.ORDER)


@pytest.mark.parametrize("command", base.ORDER)
def test_every_command_explains_itself(command):
    done = cli(command, "--help")
    assert done.returncode == 0 and f"hf-efficient {command}" in done.stdout
    if command != "card":  # which prints Markdown
        assert "--json" in done.stdout


def test_list_and_env_are_readable_by_machines():
    names = json.loads(cli("list", "--json").stdout)
    assert "local" in names["attention"] and "bbc-news" in names["recipes"] and "t5" in names["families"]
    assert {"loss", "movement", "obs"} <= set(names["importance"]) and "onnx" in names["formats"]
    assert cli("list", "recipes").stdout.strip() == "recipes: " + ", ".join(names["recipes"])
    facts = json.loads(cli("env", "--json").stdout)
    assert facts["torch"] and facts["transformers"] and facts["hf_efficient"] and "torchao" in facts
    assert "gpu: none" in cli("env").stdout or facts["gpu"]


def test_the_listed_names_are_those_there_are():
    from hf_efficient.distillation.terms import LOSSES

    assert json.loads(cli("list", "losses", "--json").stdout)["losses"] == list(LOSSES)


MISTAKES = [
    ("compress bbc-nws", "No such recipe|'bbc-news'"),
    ("compress nope.yaml", "No such recipe 'nope.yaml'. Did you mean 'nodata.yaml'"),
    ("compress bad.yaml", "bad.yaml is not valid YAML"),
    ("compress tiny", "tiny is a folder, but not that of a run"),
    ("compress nodata.yaml", "No such data file 'row.csv'. Did you mean 'rows.csv'"),
    ("compress column.yaml", "no text column called 'txt'. Did you mean 'text'"),
    ("compress good.yaml --data.name_or_path empty.csv", "one row or more"),
    ("compress good.yaml --data.txt_column text", "data.txt_column: unknown key. Did you mean 'text_column'"),
    ("compress good.yaml --ouput-dir out", "No such option --ouput-dir. Did you mean --output-dir?"),
    ("compress good.yaml --output-dir full", "full is not empty and not a run"),
    ("compress good.yaml --output-dir file", "file is a file"),
    ("compress good.yaml --output-dir file/x", "file/x: Not a directory|name another one"),
    ("compress good.yaml --resume", "no run in out/c"),
    ("compress good.yaml extra", "not an option"),
    ("compress good.yaml --seed abc", "seed must be an integer|'abc'"),
    ("compress good.yaml --stages.0.prune.ratio 1", "there are 0 stages"),
    ("compress digits --prune.ratoi 0.5", "ratoi|Did you mean 'ratio'"),
    ("compress digits --prune.ratio 1.5", "ratio|between 0 and 1"),
    ("compress digits --prune.importance tayler", "Did you mean 'taylor'"),
    ("compress --prune.ratio 0.5 digits", "recipe comes first"),
    ("plan nope", "Cannot load 'nope'|There is no folder 'nope' here"),
    ("plan broken", "broken/config.json|JSON"),
    ("plan tiny --ratio 2", "between 0 and 1|2.0"),
    ("plan tiny --metric flops", "Unknown metric 'flops'. Known: latency, macs, parameters"),
    ("plan tiny --granularity heads", "Did you mean 'head'"),
    ("plan good.yaml", "no prune stage"),
    ("plan tiny --output file/plan.json", "name another one"),
    ("measure no/such/folder", "Cannot load"),
    ("measure cut", "Cannot load the weights cut/model.safetensors"),
    ("measure full", "Cannot load 'full'"),
    ("measure tiny --task clasification", "Known:"),
    ("measure tiny --sequence-length 0", "positive integer, got 0"),
    ("measure tiny --sequence-length 9999", "32 positions"),
    ("measure tiny --batch-size 0", "batch_size must be a positive integer"),
    ("measure tiny --repeats 1", "repeats must be an integer of at least 2, got 1"),
    ("report nope", "No readable report"),
    ("report badresult", "not a report of hf_efficient"),
    ("report result --plot file/plot.png", "file: File exists"),
    ("report result --page file/page.html", "file: File exists"),
    ("card nope", "No readable report"),
    ("push result --repo-id me/x", "no model"),
    ("push full --repo-id me/x", "No readable report"),
    ("push result --repo-id x", "user/name"),
    ("export tiny --format tflite", "Unknown format 'tflite'. Known: executorch, gguf, onnx"),
    ("export tiny --quantize int4", "Did you mean 'int8'"),
    ("export tiny --format torch --quantize int8", "only onnx"),
    ("export tiny --output-dir full", "full is not empty"),
    ("export tiny --output-dir file", "file is a file"),
    ("export tiny --output-dir file/x", "name another one"),
    ("list recipe", "Did you mean 'recipes'"),
    ("prune --model tiny --dataset rows.csv --task text --ratio 0.5 --output_dir o", "Unknown task 'text'"),
    ("prune --model tiny --dataset rows.csv --task causal-lm --output_dir o", "Give ratio or sweep"),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_users_error_is_one_message_and_exit_code_1(line, words, place, monkeypatch):
    monkeypatch.chdir(place)
    done = cli(*line.split())
    assert done.returncode == 1, done.stderr
    message = done.stderr.splitlines()
    begin = next(number for number, each in enumerate(message) if each.startswith("error: "))
    assert "Traceback" not in done.stderr and begin <= 1  # a note on the data may come first
    assert all(word in done.stderr for word in words.split("|")), done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    "line", ["", "compress", "plan tiny --ratio half", "measure tiny --device cuda", "push result", "nope", "prune"]
)
def test_a_line_that_cannot_be_read_is_exit_code_2(line, place, monkeypatch):
    monkeypatch.chdir(place)
    done = cli(*line.split())
    assert done.returncode == 2 and ("Usage" in done.stdout + done.stderr or "usage" in done.stderr)
    assert "Traceback" not in done.stderr


def test_a_folder_that_may_not_be_written(place, monkeypatch):
    monkeypatch.chdir(place)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "out/c")

    monkeypatch.setattr("hf_efficient.pipeline.workspace.Workspace.open", refuse)
    done = cli("compress", "column.yaml", "--data.text_column", "text")
    assert done.returncode == 1 and "error: out/c: Permission denied. Check that" in done.stderr
    with pytest.raises(PermissionError):
        cli("--debug", "compress", "column.yaml", "--data.text_column", "text")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "error: No space left on device. Make room"),
        (PermissionError(13, "Permission denied", "out"), "error: out: Permission denied. Check that the folder"),
        (ConnectionResetError("the line is dead."), "error: the line is dead. `hf-efficient --debug"),
    ],
)
def test_what_the_system_refuses_is_told(error, words, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("hf_efficient.pipeline.compress.compress", refuse)
    done = cli("compress", "digits")
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_missing_extras_name_the_pip_command(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("hf_efficient.runtimes.formats.find_spec", lambda name: None)
    assert 'pip install "hf-efficient[export]"' in cli("export", "tiny").stderr
    monkeypatch.setattr(importlib.import_module("hf_efficient.measurement.energy"), "find_spec", lambda name: None)
    assert 'pip install "hf-efficient[energy]"' in cli("measure", "tiny", "--energy").stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'pip install "hf-efficient[plots]"' in cli("report", "result", "--plot", "x.png").stderr


def test_debug_shows_where_an_error_arose():
    assert cli("compress", "bbc-nws").returncode == 1
    with pytest.raises(HfEfficientError, match="No such recipe"):
        cli("--debug", "compress", "bbc-nws")
    debug = process("--debug", "compress", "bbc-nws")
    assert debug.returncode == 1 and "Traceback" in debug.stderr and "No such recipe" in debug.stderr


def test_ctrl_c_is_exit_code_130(monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_efficient.pipeline.compress.compress", stop)
    done = cli("compress", "digits")
    assert done.returncode == base.STOPPED == 130
    assert done.stderr.strip() == "stopped; the same command goes on where it was"


def test_measure_prints_a_table_and_json(place):
    options = ("--sequence-length", "8", "--repeats", "2")
    assert "MACs" in cli("measure", str(place / "tiny"), *options).stdout
    done = cli("measure", str(place / "tiny"), "--baseline", str(place / "tiny"), *options, "--json")
    assert json.loads(done.stdout)["comparison"]["mac_ratio"] == 1.0
    short = json.loads(cli("measure", str(place / "tiny"), "--repeats", "2", "--json").stdout)
    assert short["workload"]["sequence_length"] == 32  # all that it takes


def test_a_plan_is_one_json_document(place, monkeypatch):
    monkeypatch.chdir(place)
    alone = json.loads(cli("plan", "tiny", "--json", "--output", "plan.json").stdout)
    assert alone == json.loads((place / "plan.json").read_text()) and alone["config"]["sequence_length"] == 32
    rounds = json.loads(cli("plan", "rounds.yaml", "--json").stdout)
    assert len(rounds) == 2 and all(each["format"] == alone["format"] for each in rounds)


def test_a_plan_says_how_what_is_asked_for_will_load(place):
    asked = ("plan", str(place / "tiny"), "--ratio", "0.2", "--round-to", "4", "--granularity", "neuron")
    assert "(plugin)" in cli(*asked).stdout and "(portable)" in cli(*asked, "--allocation", "uniform").stdout
    told = json.loads(cli(*asked, "--json").stdout)
    assert told["config"]["allocation"] == "global" and told["forecast"]["loads_with"] == "plugin"
    wrong = cli(*asked, "--allocation", "unifrom")
    assert wrong.returncode == 1 and "Did you mean 'uniform'" in wrong.stderr


def test_overrides_take_both_spellings():
    assert parse_overrides(["--prune.ratio", "0.5", "--seed=1"]) == {"prune.ratio": "0.5", "seed": "1"}
    assert parse_overrides(["--prune.ratio", "-0.5"], ("resume",)) == {"prune.ratio": "-0.5"}
    with pytest.raises(ConfigError, match="needs a value"):
        parse_overrides(["--prune.ratio"])


def test_prune_and_distill_are_the_scripts(monkeypatch):
    for command, flag in (("prune", "--sweep"), ("distill", "--student_layers")):
        done = cli(command, "--help")
        assert done.returncode == 0 and flag in done.stdout and f"usage: hf-efficient {command}" in done.stdout

    def run(script):
        print("a table")
        return [{"ratio": 0.5}]

    monkeypatch.setattr("hf_efficient.cli.programs.prune.run", run)
    flags = ("--model", "m", "--dataset", "d", "--task", "causal-lm", "--ratio", "0.5", "--output_dir", "o")
    done = cli("prune", *flags, "--json")
    assert json.loads(done.stdout) == [{"ratio": 0.5}] and done.stderr == "a table\n"
    assert cli("prune", *flags).stdout == "a table\n"


def test_version_and_module():
    import hf_efficient

    assert process("--version").stdout.strip() == hf_efficient.__version__ == cli("--version").stdout.strip()


@pytest.mark.processes
def test_the_shell_completes(tmp_path, place, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # tests may run under no shell
    assert "hf-efficient" in cli("--show-completion", "bash").stdout
    done = process("--install-completion", "bash", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "hf-efficient" in (tmp_path / ".bash_completions" / "hf-efficient.sh").read_text()
    for typed, wanted in (("co", {"compress"}), ("compress bbc-news-l", {"bbc-news-linear", "bbc-news-long"})):
        line = f"hf-efficient {typed}"
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
        found = process(**words, _HF_EFFICIENT_COMPLETE="complete_bash").stdout.split()
        assert set(found) == wanted


def test_a_result_is_shown_and_its_card_written_anew(tmp_path):
    one, run = tmp_path / "one", tmp_path / "run"
    sample_report().save(one)
    sample_report().save(run / "model")
    page, plot = tmp_path / "new" / "p.html", tmp_path / "new" / "p.png"
    shown = cli("report", str(one), str(run), "--plot", str(plot), "--page", str(page))
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("latency, median") == 2 and plot.stat().st_size > 1000
    assert "2 results" in page.read_text()
    assert len(json.loads(cli("report", str(one), str(run), "--json").stdout)) == 2
    assert cli("card", str(run), "--repo-id", "me/fast").returncode == 0
    assert "# fast" in (run / "model" / "README.md").read_text()
    printed = cli("card", str(one), "--repo-id", "me/fast", "--print").stdout
    assert "# fast" in printed and not (one / "README.md").exists()


def test_a_run_goes_on_by_its_folder(tmp_path, quick_end):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(Recipe.from_dict(TINY | {"teacher": {"max_steps": 1}, "stages": []}).to_yaml())
    folder = str(tmp_path / "out")
    assert cli("compress", str(recipe), "--output-dir", folder).returncode == 0
    (tmp_path / "out" / "model").rename(tmp_path / "away")
    again = cli("compress", folder, "--resume", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["recipe"]["name"] == "tiny" and (tmp_path / "out" / "model").is_dir()
    other = cli("compress", folder, "--seed", "3")
    assert other.returncode == 1 and "Leave out the overrides" in other.stderr


def test_processes_start_the_same_command_again(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("hf_efficient.io.process.run_together", lambda *words: asked.append(words) or 7)
    monkeypatch.delenv("HF_EFFICIENT_PROCESSES", raising=False)
    words = ("compress", "digits", "--processes", "3", "--output-dir", str(tmp_path / "out"))
    assert cli(*words).returncode == 7
    assert asked == [(3, "hf_efficient", *words)]
    os.environ.pop("HF_EFFICIENT_PROCESSES")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = cli(*words)
    assert done.returncode == 1 and "has started the processes already" in done.stderr
    assert len(asked) == 1 and not (tmp_path / "out").exists()


def test_one_process_of_several_answers(monkeypatch):
    assert cli("list", "tasks").stdout
    monkeypatch.setenv("RANK", "1")
    done = cli("list", "tasks")
    assert not done.stdout and done.returncode == 0
    assert cli("list", "nothing").stderr.startswith("error in process 1: ")


def test_what_is_missed_is_told_once(monkeypatch, tmp_path):
    def misses(*args, **kwargs):
        raise RequirementError(["size is 0.5 of the teacher, more than 0.25", "speedup is 1.00x, less than 4x"])

    monkeypatch.setattr("hf_efficient.pipeline.compress.compress", misses)
    words = ("compress", "digits", "--output-dir", str(tmp_path / "out"))
    done = cli(*words)
    assert done.returncode == 3 and done.stderr.count("missed: ") == 2 and not done.stdout
    monkeypatch.setenv("RANK", "1")
    done = cli(*words)
    assert done.returncode == 3 and "missed" not in done.stderr
