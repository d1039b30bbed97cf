"""The evaluation harness of EleutherAI reads a pruned model as any checkpoint, and finds what we compute.

lm-eval runs as a program of its own, where hf_efficient cannot be imported, on a task of three lines.
"""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from ..gguf_files import make_tokenizer
from .test_pruned_decoders import shrunk

ROWS = [
    {"question": "the cat sat on", "choices": ["12 mats", "67 miles"], "answer": 0},
    {"question": "345 dogs", "choices": ["ran", "sat on it"], "answer": 1},
    {"question": "to see", "choices": ["it", "the cat"], "answer": 0},
]
PROGRAM = """
import runpy, sys
sys.modules["hf_efficient"] = None  # importing it fails
runpy.run_module("lm_eval", run_name="__main__", alter_sys=True)
"""


def write_task(folder: Path) -> None:
    (folder / "rows.json").write_text("\n".join(map(json.dumps, ROWS)))
    task = {
        "task": "cats",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "tasks").mkdir()
    (folder / "tasks" / "cats.yaml").write_text(yaml.safe_dump(task))


def evaluated(folder: Path) -> list[dict]:
    """The samples that lm-eval writes, without a network."""
    # fmt: off
    command = [
        sys.executable, "-c", PROGRAM, "--model", "hf", "--model_args", f"pretrained={folder / 'model'},dtype=float32",
        "--tasks", "cats", "--include_path", "tasks", "--device", "cpu", "--output_path", "out", "--log_samples",
    ]
    # fmt: on
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(command, cwd=folder, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [samples] = (folder / "out").rglob("samples_cats_*.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


def log_likelihood(model, tokenizer, question: str, choice: str) -> float:
    """Of the tokens of the choice, after those of the question."""
    first = len(tokenizer(question)["input_ids"])
    ids = tokenizer(f"{question} {choice}", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        scores = model(ids).logits[0, :-1].double().log_softmax(-1)
    return scores.gather(1, ids[0, 1:, None])[first - 1 :].sum().item()


@pytest.mark.thorough
@pytest.mark.processes
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval")
def test_lm_eval_finds_the_log_likelihoods_that_we_compute(tmp_path):
    model, tokenizer = shrunk("portable"), make_tokenizer()
    assert type(model) is LlamaForCausalLM
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_task(tmp_path)
    samples, right = evaluated(tmp_path), []
    assert len(samples) == len(ROWS)
    for sample in samples:
        row = ROWS[sample["doc_id"]]
        ours = [log_likelihood(model, tokenizer, row["question"], choice) for choice in row["choices"]]
        theirs = [float(answer[0][0]) for answer in sample["resps"]]
        assert theirs == pytest.approx(ours, rel=1e-4) and not math.isclose(*ours, rel_tol=1e-2)
        right.append(float(ours.index(max(ours)) == row["answer"]))
        assert sample["acc"] == right[-1]
    assert 0 < sum(right) < len(right), "a task on which all is right or wrong shows little"
