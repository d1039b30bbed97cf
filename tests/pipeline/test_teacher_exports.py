"""The teacher in the runtimes of the student's exports: made once, kept with the run, and missed with a reason."""

from types import SimpleNamespace

import pytest

from hf_efficient import ConfigError, UnsupportedModelError
from hf_efficient.pipeline import teachers
from hf_efficient.recipes.settings import MeasureSettings
from hf_efficient.runtimes import export as module
from hf_efficient.stages.settings import read

FACTS = {"format": "onnx", "quantize": "int8", "cache": False}


@pytest.fixture
def run(tmp_path):
    prepared = SimpleNamespace(test=list(range(8)), collator=list)
    return SimpleNamespace(folder=tmp_path, data=lambda config: prepared, processor="tokenizer")


@pytest.fixture
def made(monkeypatch):
    """What was exported: (folder, arguments)."""
    calls = []

    def export(model, format, folder, **options):
        calls.append((folder.name, options))
        folder.mkdir(parents=True)
        (folder / "program").write_text("")

    monkeypatch.setattr(module, "export", export)
    return calls


def test_it_is_made_as_the_students_was_and_once(run, made):
    teacher = SimpleNamespace(config=None)
    folder, note = teachers.exported_teacher(run, teacher, FACTS)
    assert folder == run.folder / "teacher-exports" / "onnx-int8" and folder.is_dir() and not note
    [(name, options)] = made
    assert (
        name == "onnx-int8"
        and [each.name for each in folder.iterdir()] == ["program"]
        and options["quantize"] == "int8"
        and options["inputs"] == [[0, 1], [2], [3, 4, 5, 6, 7]]
    )
    assert teachers.exported_teacher(run, teacher, FACTS) == (folder, "") and len(made) == 1
    other, _ = teachers.exported_teacher(run, teacher, FACTS | {"quantize": None})
    assert other.name == "onnx" and len(made) == 2
    assert sorted(each.name for each in folder.parent.iterdir()) == ["onnx", "onnx-int8"], "nothing temporary stays"


def test_a_run_that_was_killed_makes_it_anew(run, made, monkeypatch):
    teacher, right = SimpleNamespace(config=None), module.export

    def killed(model, format, folder, **options):
        right(model, format, folder, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "export", killed)
    monkeypatch.setattr(teachers, "remove_own", lambda folder: None)  # as after a kill -9
    with pytest.raises(KeyboardInterrupt):
        teachers.exported_teacher(run, teacher, FACTS)
    monkeypatch.undo()
    monkeypatch.setattr(module, "export", right)
    folder, _ = teachers.exported_teacher(run, teacher, FACTS)
    assert len(made) == 2 and [each.name for each in folder.parent.iterdir()] == ["onnx-int8"]


def test_what_cannot_be_made_is_told(run, monkeypatch):
    def export(*arguments, **options):
        raise UnsupportedModelError("it computes another output")

    monkeypatch.setattr(module, "export", export)
    folder, note = teachers.exported_teacher(run, SimpleNamespace(config=None), FACTS)
    assert folder is None and "onnx-int8 is not known" in note and note.endswith("it computes another output")


def test_a_link_to_elsewhere_is_refused(run, made, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (run.folder / "teacher-exports").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "onnx-int8").symlink_to("/")
    with pytest.raises(OSError, match=r"link|lead"):
        teachers.exported_teacher(run, SimpleNamespace(config=None), FACTS)
    assert not made


def test_recipes_say_what_is_measured():
    usual = MeasureSettings()
    assert usual.teacher_exports and not {"teacher_exports", "serving"} & usual.to_dict().keys()
    told = {"teacher_exports": False, "serving": ["short", "mixed"]}
    settings = read(MeasureSettings, told, "measure")
    assert settings.to_dict() == usual.to_dict() | told and read(MeasureSettings, settings.to_dict(), "m") == settings
    for wrong in (["short", "short"], ["fast"], "short", [1]):
        with pytest.raises(ConfigError, match=r"measure.serving must be a list of different names out of short, long"):
            read(MeasureSettings, {"serving": wrong}, "measure")
    for task in ("image-classification", "seq2seq", "speech-ctc"):
        with pytest.raises(ConfigError, match="for models that read one text"):
            settings.check_task(task)
    settings.check_task("sentence-embeddings")
