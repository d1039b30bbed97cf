"""The tasks beside classification and generation: through a recipe, and through the scripts, on tiny models."""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import normalize

from hf_efficient import ConfigError, Recipe, UnsupportedModelError, compress, load_report
from hf_efficient.cli.programs.cache_teacher import read as read_cache
from hf_efficient.cli.programs.cache_teacher import run as cache
from hf_efficient.cli.programs.distill import read, run
from hf_efficient.data.tasks import TASKS
from hf_efficient.models.pooling import POOLINGS, pool

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(30))]
PARITY = {0: "even", 1: "odd"}
TRAINING = {"max_steps": 4, "batch_size": 8, "learning_rate": 1e-3}
PRUNE = {"prune": {"ratio": 0.3, "granularity": ["head", "neuron"], "round_to": 4, "calibration_samples": 8}}


def model_folder(folder, task, **changes):
    """A BERT of two layers with its tokenizer; the same each time."""
    if folder.is_dir():
        return folder
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **names)
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes | changes)
    getattr(transformers, TASKS[task].auto_class).from_config(config).save_pretrained(folder)
    return folder


def rows_file(folder, task):
    def row(n):
        words = [f"w{(n * k) % 30}" for k in range(1, 6)]
        text = " ".join(words)
        answers = {"text": [words[n % 5]], "answer_start": [text.index(words[n % 5])]}
        return {
            "sentence-embeddings": {"text": text, "twin": " ".join(words[:2])},
            "token-classification": {"tokens": words, "ner_tags": [PARITY[int(word[1:]) % 2] for word in words]},
            "masked-lm": {"text": text},
            "question-answering": {"question": words[0], "context": text, "answers": answers},
        }[task]

    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row(n)) for n in range(1, 31)))
    return path


def recipe(folder, task, *stages, data=None, **changes):
    settings = {
        "name": "tiny",
        "task": task,
        "model": {"name_or_path": str(model_folder(folder / "teacher", task))},
        "data": {"name_or_path": str(rows_file(folder, task)), "max_length": 12} | (data or {}),
        "stages": list(stages),
        "measure": {"repeats": 2},
    }
    return Recipe.from_dict(settings | changes)


def test_a_sentence_encoder_end_to_end(tmp_path):
    """Pruned, distilled without labels, scored by pairs, and its card says how to get the vectors."""
    losses = {"embedding": 1.0, "hidden": 0.5, "relation": 0.1}
    asked = recipe(
        tmp_path,
        "sentence-embeddings",
        {"attention": {"kind": "local", "window": 4}},
        PRUNE,
        {"distill": TRAINING | {"max_steps": 10, "losses": losses, "pooling": "cls"}},
        data={"text_pair_column": "twin"},
    )
    report = compress(asked, output_dir=tmp_path / "out")
    quality, model_dir = report.student.quality, tmp_path / "out" / "model"
    assert quality.main.name == report.comparison.quality_score == "retrieval@1" and quality.samples == 6
    assert 0 <= quality.main.value <= 1 and 0 <= report.comparison.agreement <= 1
    assert report.comparison.mac_ratio < 0.9 and report.auto_class == "AutoModel"
    facts = report.stages[-1].facts
    assert {f"loss_{name}" for name in losses} <= facts.keys() and facts["train"] == 48
    assert load_report(model_dir) == report
    card = (model_dir / "README.md").read_text()
    assert "pipeline_tag: sentence-similarity" in card and "retrieval@1" in card
    scope = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("path/to/this/model", str(model_dir)), scope)
    inputs = scope["model"].tokenizer(["A text.", "Another text."], return_tensors="pt")
    states = transformers.AutoModel.from_pretrained(model_dir)(**inputs).last_hidden_state.detach()
    vectors, mask = torch.tensor(scope["vectors"]), inputs["attention_mask"].bool()
    assert torch.allclose(vectors, normalize(pool(states, mask, "cls")), atol=1e-6)
    assert not torch.allclose(vectors, normalize(pool(states, mask, "mean")), atol=1e-3)


@pytest.mark.usefixtures("quick_end")
def test_labels_of_words_end_to_end(tmp_path):
    """The teacher is fine-tuned with a head for the labels of the data, which the student keeps."""
    distill = {"distill": TRAINING | {"losses": {"kd": 1.0, "ce": 0.5}}}
    asked = recipe(tmp_path, "token-classification", PRUNE, distill, teacher=TRAINING | {"max_steps": 60})
    report = compress(asked, output_dir=tmp_path / "out")
    names = [score.name for score in report.student.quality.scores]
    assert names == ["accuracy", "macro_f1", "loss"] and report.student.quality.targets == 30
    assert report.teacher.quality.main.value > 0.6  # half of the labels are those of each class
    model = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "out" / "model")
    assert model.config.id2label == PARITY


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_pooling_of_a_recipe_is_that_of_its_last_word(pooling, tmp_path):
    asked = recipe(tmp_path, "sentence-embeddings", {"distill": {"pooling": pooling}}, {"distill": {}})
    assert asked.pooling == pooling and asked.stages[1].settings.losses == {"embedding": 1.0}
    assert recipe(tmp_path, "masked-lm", {"distill": {}}).stages[0].settings.losses == {"kd": 1.0}


@pytest.mark.parametrize(
    ("task", "stages", "changes", "words"),
    [
        ("sentence-embeddings", [], {"teacher": {}}, "teacher: .*has no labels.*Leave teacher out"),
        ("sentence-embeddings", [{"distill": {"losses": {"kd": 1}}}], {}, r"stages\[0\].*`kd`.*no head"),
        ("masked-lm", [{"distill": {"losses": {"embedding": 1}}}], {}, r"stages\[0\].distill.losses.*without a head"),
        ("masked-lm", [], {"data": {"tokens_column": "x"}}, "data.tokens_column has no meaning for task 'masked-lm'"),
        ("question-answering", [], {"data": {"text_column": "x"}}, "answers_column, context_column, max_length, q"),
        ("sentence-embeddings", [], {"data": {"tokens_column": "x"}}, "uses label_column, max_length, text_column"),
    ],
)
def test_recipes_that_cannot_be_meant(task, stages, changes, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        recipe(tmp_path, task, *stages, **changes)


def test_two_stacks_have_no_single_embedding(tmp_path):
    asked = recipe(tmp_path, "sentence-embeddings")
    sizes = {"d_model": 8, "d_kv": 4, "num_heads": 2, "num_layers": 1, "d_ff": 8}
    transformers.T5Config(vocab_size=len(WORDS), **sizes).save_pretrained(tmp_path / "teacher")
    with pytest.raises(UnsupportedModelError, match="one stack; t5 has an encoder and a decoder"):
        compress(asked, output_dir=tmp_path / "out")


def flags(folder, task, *more):
    given = {"teacher": model_folder(folder / "teacher", task, num_labels=2, id2label=PARITY)}
    given |= {"dataset": rows_file(folder, task), "output_dir": folder / "out"}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return [*words, "--task", task, "--max_length", "12", "--use_cpu", *more]


def training(folder, task, *more):
    quiet = ["--report_to", "none", "--disable_tqdm", "true", "--dataloader_pin_memory", "false"]
    return read(flags(folder, task, "--student_layers", "1", "--max_steps", "2", *quiet, *more))


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        ("sentence-embeddings", {"eval_loss_embedding"}),
        ("token-classification", {"eval_accuracy", "eval_loss_ce", "eval_loss_kd", "eval_teacher_agreement"}),
        ("masked-lm", {"eval_loss_ce", "eval_loss_kd", "eval_teacher_agreement"}),
        ("question-answering", {"eval_span_accuracy", "eval_loss_ce", "eval_loss_kd", "eval_teacher_agreement"}),
    ],
)
def test_each_task_is_distilled_by_the_script(task, metrics, tmp_path, capsys):
    script, args = training(tmp_path, task)
    assert args.losses == ({"embedding": 1.0} if task == "sentence-embeddings" else {"ce": 1.0, "kd": 1.0})
    found = run(script, args)
    assert metrics <= found.keys() and ("eval_loss_kd" in found) == ("eval_loss_kd" in metrics)
    assert all(0 <= found[name] <= 1 for name in metrics if "loss" not in name)
    student = getattr(transformers, TASKS[task].auto_class).from_pretrained(tmp_path / "out")
    assert student.config.num_hidden_layers == 1
    assert run(*training(tmp_path, task, "--dry_run", "--overwrite")) == {}
    assert "loss " in capsys.readouterr().out


@pytest.mark.parametrize("task", ["sentence-embeddings", "token-classification", "question-answering"])
def test_each_task_is_distilled_from_a_cache(task, tmp_path):
    answers = cache(read_cache(flags(tmp_path, task)))
    assert len(answers) == (24 + 2 * 6 if task == "sentence-embeddings" else 30)  # whole texts, and halves in test
    from_cache = ["--teacher_cache", str(tmp_path / "out"), "--output_dir", str(tmp_path / "student")]
    found = run(*training(tmp_path, task, *from_cache))
    live = run(*training(tmp_path, task, "--output_dir", str(tmp_path / "live")))
    name = "eval_loss_embedding" if task == "sentence-embeddings" else "eval_loss_kd"
    assert found[name] == pytest.approx(live[name], rel=1e-5)


def test_a_run_resumed_within_an_epoch_has_the_masks_of_the_whole_run(tmp_path):
    steps = ["--max_steps", "4", "--save_steps", "1", "--per_device_train_batch_size", "2", "--save_total_limit", "9"]
    run(*training(tmp_path, "masked-lm", *steps))
    whole = load_file(tmp_path / "out" / "model.safetensors")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    run(*training(tmp_path, "masked-lm", *steps, "--resume_from_checkpoint", "true"))
    resumed = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_masks_that_change_cannot_be_cached(tmp_path):
    with pytest.raises(ConfigError, match="masked-lm has other masks in every epoch"):
        read_cache(flags(tmp_path, "masked-lm"))
    with pytest.raises(ConfigError, match="leave teacher_cache out"):
        training(tmp_path, "masked-lm", "--teacher_cache", str(tmp_path))


def test_losses_of_another_task_are_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="no head"):
        training(tmp_path, "sentence-embeddings", "--losses", '{"kd": 1}')
    file = tmp_path / "run.yaml"
    file.write_text("task: sentence-embeddings\nlosses: {hidden: 1}\nstudent_layers: 1\n")
    words = ["--config", str(file), "--teacher", "x", "--dataset", "y", "--output_dir", str(tmp_path / "out")]
    assert read([*words, "--use_cpu"])[1].losses == {"hidden": 1.0}
