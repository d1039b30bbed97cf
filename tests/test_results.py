"""The committed results are what the README and the cards promise; each comes from a program that anyone can run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_efficient import load_report
from hf_efficient.recipe import shipped_recipes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def test_the_main_job_keeps_its_promise():
    report = load_report(ROOT / "model_cards" / "bbc-news")
    teacher, student, compared = report.teacher, report.student, report.comparison
    assert teacher.quality.main.value >= 0.96
    assert compared.quality_difference >= -0.01
    assert student.workload.batch_size == 1 and student.workload.sequence_length == 512
    assert compared.speedup >= 4
    assert teacher.size.non_embedding_parameters >= 3 * student.size.non_embedding_parameters
    assert report.commit and not report.commit.endswith("dirty")


@pytest.mark.parametrize("recipe", sorted(shipped_recipes()))
def test_every_shipped_recipe_has_a_card_of_its_present_settings(recipe):
    from hf_efficient import Recipe

    report = load_report(ROOT / "model_cards" / recipe)
    assert report.recipe == Recipe.from_yaml(recipe).to_dict()


def test_cards_and_readme_say_what_the_reports_say():
    command = [sys.executable, str(ROOT / "scripts" / "make_model_cards.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_attention_is_as_fast_as_promised_and_linear_in_memory():
    cells = json.loads((RESULTS / "attention_cpu.json").read_text())["cells"]
    found = {(cell["method"], cell["mode"], cell["length"]): cell for cell in cells}
    wanted = {("local", "forward"): 20, ("linear", "forward"): 20, ("linear", "forward+backward"): 40}
    for (method, mode), factor in wanted.items():
        assert found[method, mode, 8192]["speedup_over_dense"] >= factor
        growth = found[method, mode, 16384]["peak_bytes"] / found[method, mode, 4096]["peak_bytes"]
        assert 3 < growth < 6  # 4 times the length, about 4 times the memory


def test_pruned_models_are_as_fast_as_their_macs_say():
    variants = json.loads((RESULTS / "pruning_speed_cpu.json").read_text())["results"]
    assert len(variants) > 10 and all(variant["efficiency"] >= 0.85 for variant in variants)
