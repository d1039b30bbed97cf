"""`hf-efficient measure` on rows of data, read and pooled as the models say themselves."""

import json

import pytest

from hf_efficient import Recipe, measure
from hf_efficient.pipeline.run import Run

from ..commands import cli
from ..pipeline.test_tasks_end_to_end import rows_file
from ..sentences import chain, load

QUICK = ("--repeats", "2", "--sequence-length", "8")


@pytest.fixture
def folders(tmp_path):
    """The same transformer, which pools by the first token and by the mean; and the rows of both."""
    made = [chain(tmp_path / pooling, pooling) for pooling in ("cls", "mean")]
    return *made, rows_file(tmp_path, "sentence-embeddings")


def test_a_model_is_scored_as_its_folder_pools(folders):
    cls, mean, rows = folders
    told = ("--task", "sentence-embeddings", "--data", f"name_or_path: {rows}, text_pair_column: twin", "--json")
    done = cli("measure", str(cls), "--baseline", str(mean), *QUICK, *told, "--require", "agreement: 1.0")
    found = json.loads(done.stdout)
    scores = {name: found[name]["quality"] if name else found["quality"] for name in ("", "baseline")}
    assert done.returncode == 3 and "missed: agreement" in done.stderr  # the poolings differ
    for name, folder in (("", cls), ("baseline", mean)):
        section = {"name": "x", "task": "sentence-embeddings", "model": {"name_or_path": str(folder)}}
        run = Run(
            Recipe.from_dict(section | {"data": {"name_or_path": str(rows), "text_pair_column": "twin"}}), folder
        )
        ready, model = run.data(), load(folder)[0].model
        settings = {"dataset": ready.test, "collator": ready.collator, "task": "sentence-embeddings"}
        settings |= {"repeats": 2, "sequence_length": 8}
        by_folder = measure(model, folder=folder, **settings)
        by_name = measure(model, pooling=run.pooling, **settings)
        assert by_folder.quality == by_name.quality
        values = [score["value"] for score in scores[name]["scores"]]
        assert values == [score.value for score in by_folder.quality.scores]


def test_rows_by_their_name_alone(folders):
    cls, _, rows = folders
    done = cli("measure", str(cls), *QUICK, "--task", "sentence-embeddings", "--data", str(rows))
    assert "retrieval@1" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("--data", "rows.csv"), "--data needs --task, which says how its rows are read"),
        (("--task", "causal-lm", "--data", "name_or_path: x.csv, columns: y"), "--data.columns: unknown key"),
        (("--task", "sentence-embeddings", "--data", "no-such-file.csv"), "no-such-file.csv"),
        (
            ("--task", "text-classification", "--data", "name_or_path: x.csv, image_column: y"),
            "has no meaning for task",
        ),
    ],
)
def test_what_cannot_be_scored(words, fault, folders):
    done = cli("measure", str(folders[0]), *QUICK, *words)
    assert done.returncode == 1 and fault in done.stderr, done.stderr
