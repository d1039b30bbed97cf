"""scripts/distill.py on tiny models and local files, without a network."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from hf_efficient.cli.programs.cache_teacher import read as read_cache
from hf_efficient.cli.programs.cache_teacher import run as cached
from hf_efficient.cli.programs.distill import read, run
from hf_efficient.distillation.losses.projections import SIDE_FILE
from hf_efficient.errors import CheckpointError, ConfigError, DataError

from ..processes import launch, python

ROOT = Path(__file__).parents[2]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{n}" for n in range(30))]


@pytest.fixture
def workplace(tmp_path):
    """A teacher folder and a table of two classes: even and odd words."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    fast.save_pretrained(tmp_path / "teacher")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        id2label={0: "even", 1: "odd"},
        label2id={"even": 0, "odd": 1},
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "teacher")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        for n in range(30):
            odd = n % 2
            table.writerow([f"w{odd} w{(7 * n) % 30} w{n % 30}", "odd" if odd else "even"])
    return tmp_path


def words(workplace, *more, student=("--student_layers", "1")):
    given = {"teacher": workplace / "teacher", "dataset": workplace / "rows.csv", "output_dir": workplace / "out"}
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    quiet = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--dataloader_pin_memory", "false"]
    return [*flags, "--task", "text-classification", *student, "--max_steps", "4", "--save_steps", "2", *quiet, *more]


def test_a_table_a_teacher_and_a_student(workplace):
    metrics = run(*read(words(workplace, "--losses", '{"ce": 1, "kd": 1, "hidden": 1}')))
    assert {"eval_accuracy", "eval_loss_ce", "eval_loss_kd", "eval_loss_hidden", "eval_teacher_agreement"} <= set(
        metrics
    )
    assert 0 <= metrics["eval_accuracy"] <= 1
    out = workplace / "out"
    student = AutoModelForSequenceClassification.from_pretrained(out)
    assert student.config.num_hidden_layers == 1 and student.config.id2label == {0: "even", 1: "odd"}
    assert json.loads((out / "all_results.json").read_text())["eval_accuracy"] == metrics["eval_accuracy"]
    assert (out / "tokenizer.json").is_file() and not (out / SIDE_FILE).exists()


def test_an_existing_student_learns_the_labels_of_the_teacher(workplace):
    config = BertConfig.from_pretrained(workplace / "teacher", num_hidden_layers=1, hidden_size=8)
    BertForSequenceClassification(config).save_pretrained(workplace / "student")
    run(*read(words(workplace, student=("--student", str(workplace / "student")))))
    assert AutoModelForSequenceClassification.from_pretrained(workplace / "out").config.hidden_size == 8


def test_a_student_that_is_narrower_everywhere(workplace):
    narrow = ("--student_layers", "2", "--student_heads", "1", "--student_neurons", "8", "--student_hidden_size", "8")
    run(*read(words(workplace, student=narrow)))
    config = BertConfig.from_pretrained(workplace / "out")
    assert (config.num_hidden_layers, config.num_attention_heads) == (2, 1)
    assert (config.intermediate_size, config.hidden_size) == (8, 8)
    with pytest.raises(ConfigError, match="cut the teacher"):
        read(words(workplace, student=("--student", "x", "--student_hidden_size", "8")))


def test_an_output_folder_in_use(workplace):
    run(*read(words(workplace)))
    with pytest.raises(CheckpointError, match="--overwrite"):
        run(*read(words(workplace)))
    before = (workplace / "out" / "model.safetensors").stat().st_mtime_ns
    run(*read(words(workplace, "--resume_from_checkpoint", "true", "--max_steps", "6")))
    assert json.loads((workplace / "out" / "checkpoint-6" / "trainer_state.json").read_text())["global_step"] == 6
    run(*read(words(workplace, "--overwrite")))
    assert (workplace / "out" / "model.safetensors").stat().st_mtime_ns > before


def test_nothing_to_resume(workplace):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        run(*read(words(workplace, "--resume_from_checkpoint", "true")))
    with pytest.raises(CheckpointError, match="no such folder"):
        run(*read(words(workplace, "--resume_from_checkpoint", str(workplace / "none"))))


def test_flags_win_over_the_file(workplace):
    file = workplace / "run.yaml"
    file.write_text(
        f"teacher: {workplace}/teacher\ndataset: {workplace}/rows.csv\ntask: text-classification\n"
        f"output_dir: {workplace}/out\nstudent_layers: 2\nlearning_rate: 1e-4\ntemperature: 3\n"
        "losses: {kd: 2, ce: 0}\nlayer_map: [[1, 2]]\nuse_cpu: true\n"
    )
    script, args = read(["--config", str(file), "--temperature", "5"])
    assert (script.student_layers, args.learning_rate, args.temperature) == (2, 1e-4, 5.0)
    assert (args.losses, args.layer_map, args.use_cpu) == ({"kd": 2.0}, [[1, 2]], True)
    file.write_text("temprature: 3\n")
    with pytest.raises(ConfigError, match="Did you mean 'temperature'"):
        read(["--config", str(file)])
    with pytest.raises(ConfigError, match="No such config file"):
        read(["--config", str(workplace / "none.yaml")])


def test_wrong_settings(workplace):
    with pytest.raises(ConfigError, match="one of them"):
        read(words(workplace, student=()))
    with pytest.raises(ConfigError, match="one of them"):
        read(words(workplace, "--student", "x"))
    with pytest.raises(ConfigError, match="Did you mean 'text-classification'"):
        read(words(workplace, "--task", "text-clasification"))
    with pytest.raises(DataError, match="Did you mean 'rows"):
        run(*read(words(workplace, "--dataset", str(workplace / "row.csv"))))


def test_labels_are_compared_before_weights_are_loaded(workplace):
    (workplace / "teacher" / "model.safetensors").unlink()
    config = BertConfig.from_pretrained(workplace / "teacher")
    config.id2label, config.label2id = {0: "odd", 1: "even"}, {"odd": 0, "even": 1}
    config.save_pretrained(workplace / "teacher")
    with pytest.raises(DataError, match="another order"):
        run(*read(words(workplace)))


def test_further_metrics_are_those_of_the_evaluation(workplace):
    given = words(workplace, "--metrics", "f1", "matthews_correlation")
    metrics = run(*read(given))
    assert {"eval_accuracy", "eval_f1", "eval_matthews_correlation"} <= metrics.keys()
    with pytest.raises(ConfigError, match=r"Unknown metric 'recal'. Did you mean 'recall'\? Known: accuracy, f1"):
        read(words(workplace, "--metrics", "recal"))


SCRIPT = ROOT / "scripts" / "distill.py"
TWO = ["--losses", '{"kd": 1, "hidden": 1}', "--per_device_train_batch_size", "4"]


@pytest.mark.processes
def test_the_program(workplace):
    """The script itself: its help, a user's error on one line, and a run on two processes."""
    shown = python(SCRIPT, "--help", cwd=workplace)
    assert shown.returncode == 0 and "--temperature_squared" in shown.stdout and "--teacher" in shown.stdout
    wrong = python(SCRIPT, *words(workplace, "--temperature", "0"), cwd=workplace)
    assert wrong.returncode == 2 and "temperature must be above 0" in wrong.stderr and "Traceback" not in wrong.stderr
    launch("scripts.distill", *words(workplace, *TWO))
    check_two_processes(workplace)


@pytest.mark.thorough
@pytest.mark.processes
def test_the_program_by_accelerate(workplace):
    config = ROOT / "examples" / "accelerate" / "cpu_2.yaml"
    flags = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0", str(SCRIPT)]
    done = subprocess.run(
        [sys.executable, *flags, *words(workplace, *TWO)], capture_output=True, text=True, cwd=workplace
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check_two_processes(workplace)


def check_two_processes(workplace):
    assert json.loads((workplace / "out" / "all_results.json").read_text())["eval_loss_kd"] > 0
    state = json.loads((workplace / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["epoch"] == pytest.approx(4 / 3)  # 24 rows in steps of 2 x 4: both processes took part


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_example_configs_are_accelerates(path):
    config = load_config_from_file(str(path))
    assert config.num_processes > 1 and config.num_machines == 1
    assert getattr(config, "fsdp_config", {}).get("fsdp_version", 2) == 2
    assert getattr(config, "deepspeed_config", {}).get("zero_stage", 2) == 2


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(workplace, capsys):
    losses = '{"ce": 1, "kd": 0.5, "hidden": 2}'
    assert run(*read(words(workplace, "--losses", losses, "--dry_run", "--gradient_accumulation_steps", "2"))) == {}
    page = capsys.readouterr().out
    for line in (
        "student     BertForSequenceClassification, ",
        "layers      hidden, encoder: 0 from 0, 1 from 3",
        "loss        0.5 x kd, ",
        "steps       4 of 16 examples (8 x 2 accumulated x 1 processes)",
        "memory ",
    ):
        assert line in page
    assert not (workplace / "out").exists()
    with pytest.raises(ConfigError, match=r"0 \(embeddings\) to 3"):
        run(*read(words(workplace, "--losses", losses, "--layer_map", "[[1, 9]]", "--dry_run")))


def test_a_cached_teacher_gives_the_same_student(workplace):
    given = {"teacher": "teacher", "dataset": "rows.csv", "output_dir": "cache"}
    flags = [f"--{name}={workplace / value}" for name, value in given.items()]
    cache = cached(read_cache([*flags, "--task=text-classification", "--use_cpu"]))
    assert len(cache) == 30
    live = run(*read(words(workplace)))
    again = words(workplace, "--output_dir", str(workplace / "cached"), "--teacher_cache", str(workplace / "cache"))
    from_cache = run(*read(again))
    for name in ("eval_loss_kd", "eval_teacher_agreement", "eval_accuracy"):
        assert from_cache[name] == pytest.approx(live[name], rel=1e-5)
    with pytest.raises(DataError, match="not among the 30"):
        run(*read([*again, "--overwrite", "--max_length", "2"]))
