import json
import math
import os
import subprocess
from dataclasses import replace

import pytest

from hf_efficient.errors import CheckpointError, ConfigError
from hf_efficient.io.codec import clean
from hf_efficient.io.environment import PACKAGE, Environment, package_commit
from hf_efficient.reporting.schema import SCHEMA_VERSION, Quality, Report, Score, load_report

from .samples import STUDENT, sample_report


def test_round_trip_is_exact():
    report = sample_report()
    assert Report.from_json(report.to_json()) == report
    assert Report.from_json(report.to_json()).to_json() == report.to_json()


def test_a_changed_number_survives_as_changed():
    report = sample_report()
    changed = replace(report, student=replace(STUDENT, size=replace(STUDENT.size, macs=1)))
    assert Report.from_json(changed.to_json()) == changed != report


def test_the_smallest_report_round_trips():
    report = Report(student=replace(STUDENT, quality=None), base_model="org/model")
    assert Report.from_json(report.to_json()) == report
    assert report.schema_version == SCHEMA_VERSION == 1
    assert len(report.created) == 10 and report.created[4] == report.created[7] == "-"


def test_a_measurement_with_its_baseline_round_trips():
    nested = replace(STUDENT, baseline=STUDENT, comparison=sample_report().comparison)
    report = sample_report(student=nested)
    assert Report.from_json(report.to_json()).student.baseline == STUDENT


def test_numbers_that_are_not_finite_stay_strict_json():
    quality = Quality("causal-lm", 3, 9, (Score("loss", math.inf, math.nan, False),))
    text = sample_report(student=replace(STUDENT, quality=quality)).to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    score = Report.from_json(text).student.quality.main
    assert score.value == math.inf and math.isnan(score.standard_error)


def test_settings_become_plain_json(tmp_path):
    report = sample_report(recipe={1: (2, 3), "nested": {"x": [math.inf, None, True]}, "file": tmp_path / "data.tsv"})
    assert report.recipe == {"1": [2, 3], "nested": {"x": ["inf", None, True]}, "file": "data.tsv"}
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("/home/someone/runs/teacher", "teacher"),
        ("/home/someone/runs/teacher/", "teacher"),
        ("~/runs/teacher", "teacher"),
        ("could not read /home/someone/a.tsv: skipped", "could not read a.tsv: skipped"),
        ("dir=/home/someone/a", "dir=a"),
        ("at:/home/someone/a", "at:a"),
        ("file:///home/someone/a", "a"),
        (r"see C:\Users\someone\model now", "see model now"),
        ("org/model", "org/model"),
        ("runs/teacher", "runs/teacher"),
        ("https://huggingface.co/org/model", "https://huggingface.co/org/model"),
        ("kept 8/12 heads and/or 3 tokens/s", "kept 8/12 heads and/or 3 tokens/s"),
        ("token hf_abcdefghijklmnopqrstuvwx here", "token [removed] here"),
        ({"hub_token": "x", "token": "y", "password": "z", "max_tokens": 3}, {"max_tokens": 3}),
    ],
)
def test_paths_and_secrets_are_removed(given, kept):
    assert clean(given) == kept
    assert clean(clean(given)) == kept


def test_a_home_with_a_space_is_removed(monkeypatch):
    monkeypatch.setenv("HOME", "/home/Some One")
    assert clean("read /home/Some One/data/a.tsv twice") == "read a.tsv twice"


def test_no_secret_or_path_reaches_the_file():
    home = os.path.expanduser("~")
    report = sample_report(
        base_model="/srv/secret/teacher",
        recipe={"hub_token": "hf_abcdefghijklmnopqrstuvwx", "output_dir": f"{home}/out"},
        warnings=("tried /srv/secret/file",),
    )
    text = report.to_json()
    assert "secret" not in text and "hf_abc" not in text and home + "/" not in text
    assert report.base_model == "teacher" and report.warnings == ("tried file",)


def test_save_and_load(tmp_path):
    report = sample_report()
    assert report.save(tmp_path / "out") == tmp_path / "out" / "report.json"
    assert load_report(tmp_path / "out") == load_report(tmp_path / "out" / "report.json") == report
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    report = sample_report()
    report.save(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        sample_report(seed=99).save(tmp_path)
    assert load_report(tmp_path) == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def damaged(change):
    data = json.loads(sample_report().to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (sample_report().to_json()[:500], "not valid JSON"),
        ("[]", "not a report"),
        ("{}", "schema_version is None"),
        (damaged(lambda d: d.update(schema_version="1")), "schema_version is '1'"),
        (damaged(lambda d: d.update(schema_version=0)), "schema_version is 0"),
        (damaged(lambda d: d.update(schema_version=2)), "pip install --upgrade hf-efficient"),
        (damaged(lambda d: d.pop("created")), "Report.created: missing"),
        (damaged(lambda d: d["student"].pop("size")), "Measurement.size: missing"),
        (damaged(lambda d: d["student"]["size"].update(macs="many")), "Size.macs.*'many'"),
        (damaged(lambda d: d["student"]["size"].update(macs=True)), "Size.macs"),
        (damaged(lambda d: d["student"].update(latency=None)), "Latency"),
        (damaged(lambda d: d.update(surprise=1)), "Report.surprise: unknown"),
        (damaged(lambda d: d.update(loads_with="magic")), "Unknown loads_with"),
        (damaged(lambda d: d.update(structure={})), "Report.structure"),
    ],
)
def test_a_damaged_report_is_a_clear_error(tmp_path, text, words):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_report(tmp_path)
    assert "report.json" in str(caught.value)


def test_a_missing_or_binary_report_is_a_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="No readable report"):
        load_report(tmp_path)
    (tmp_path / "report.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="No readable report"):
        load_report(tmp_path)


def test_bad_fields_are_errors():
    with pytest.raises(ConfigError, match="Known: plugin, portable"):
        sample_report(loads_with="portabel")
    with pytest.raises(ConfigError, match="schema_version"):
        sample_report(schema_version=2)


def test_environment_names_machine_and_versions_but_nobody():
    import platform

    import torch

    found = Environment.collect()
    assert found.torch == torch.__version__ and found.python == platform.python_version()
    assert found.cpu and found.cores == os.cpu_count()
    assert platform.node() not in str(found)


def git(folder, *command):
    done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_the_packages_own(tmp_path):
    package = tmp_path / "hf_efficient"
    package.mkdir()
    (package / "version.py").write_text("__version__ = '0'\n")
    assert package_commit(package) is None
    git(tmp_path, "init", "-q")
    git(
        tmp_path, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "--allow-empty", "-m", "another project"
    )
    assert package_commit(package) is None  # copied into someone's checkout, not tracked there
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "start")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert package_commit(package) == head
    (package / "version.py").write_text("__version__ = '1'\n")
    assert package_commit(package) == f"{head}-dirty"
    assert (PACKAGE / "version.py").is_file()
