"""A disk that runs full while something is written: a clear error, nothing half-written is taken for finished."""

import errno
import json
import os

import datasets
import pytest
import torch
import transformers.modeling_utils
from safetensors import SafetensorError

from hf_efficient import CheckpointError, ConfigError, TeacherCache, cache_teacher, compress
from hf_efficient.io.disk import clear_disk_errors, disk_fault, write_atomic
from hf_efficient.pipeline.workspace import Workspace
from hf_efficient.runtimes.export import Exported

from ..distillation.caching import collate_rows, make_cache, rows_of
from ..distillation.tiny import make_pair
from .tiny import recipe, run_stage, run_stages

FULL = OSError(errno.ENOSPC, "No space left on device")
FULL_SAFETENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
FULL_TORCH = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 22")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FULL, "No space left on device. Free some space."),
        (FULL_SAFETENSORS, "No space left on device. Free some space."),
        (FULL_TORCH, "cut short"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "cut short"),
        (OSError(errno.EROFS, "Read-only file system"), "can be written"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "larger quota"),
        (FileNotFoundError(errno.ENOENT, "No such file"), None),
        (RuntimeError("shapes do not match"), None),
        (ValueError("No space left on device"), None),
    ],
    ids=str,
)
def test_what_counts_as_a_fault_of_the_disk(error, words):
    assert disk_fault(error) is None if words is None else words in disk_fault(error)
    expected = CheckpointError if words else type(error)
    with pytest.raises(expected) as caught, clear_disk_errors("out", "Do it again."):
        raise error
    if words:
        assert str(caught.value).startswith("out could not be written: ") and str(caught.value).endswith(
            "Do it again."
        )
        assert caught.value.__cause__ is error


def test_errors_of_ours_pass_as_they_are():
    with pytest.raises(ConfigError, match=r"^mine$"), clear_disk_errors("out", "again"):
        raise ConfigError("mine")


def test_a_text_is_complete_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "stage.json"
    write_atomic(path, "old")
    real = os.fdopen

    def half(descriptor, *args, **kwargs):
        with real(descriptor, "wb") as file:
            file.write(b"ne")
        raise FULL

    monkeypatch.setattr("hf_efficient.io.disk.os.fdopen", half)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new and longer")
    assert path.read_text() == "old" and [each.name for each in tmp_path.iterdir()] == ["stage.json"]


@pytest.fixture
def full_disk(monkeypatch):
    """`full_disk(5)`: the sixth file of weights is written to its half, and so are all after it."""

    def limit(files, error=FULL_SAFETENSORS):
        real, written = transformers.modeling_utils.safe_save_file, []

        def save(tensors, filename, *args, **kwargs):
            written.append(filename)
            real(tensors, filename, *args, **kwargs)
            if len(written) > files:
                with open(filename, "r+b") as file:
                    file.truncate(100)
                raise error

        monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", save)
        return written

    return limit


def test_a_run_on_a_full_disk_goes_on_when_there_is_space_again(tmp_path, full_disk, monkeypatch):
    """Full in the teacher's checkpoint, and then in the weights of the next stage."""
    asked, folder = recipe(**{"teacher.epochs": 1, "distill.max_steps": 1}), tmp_path / "out"

    def stopped(files):
        full_disk(files)
        with pytest.raises(CheckpointError, match=r"out could not be written: .*Free some space.*command again"):
            compress(asked, output_dir=folder)
        monkeypatch.undo()
        return {path.name for path in folder.iterdir() if path.is_dir()}

    assert stopped(0) == {"0-teacher.partial"}
    assert not list(folder.glob("*/trainer/*/complete"))
    assert stopped(2) == {"0-teacher", "1-prune.partial"}  # the teacher's checkpoint and its result fit
    teacher = folder / "0-teacher/model.safetensors"
    before = teacher.stat().st_mtime_ns, teacher.read_bytes()
    run_stages(asked, folder)
    assert (teacher.stat().st_mtime_ns, teacher.read_bytes()) == before
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"0-teacher", "1-prune", "2-distill"}
    straight = run_stages(asked, tmp_path / "straight")
    assert (straight / "model.safetensors").read_bytes() == (folder / "2-distill/model.safetensors").read_bytes()


def test_a_result_is_there_as_a_whole_or_not_at_all(tmp_path):
    space = Workspace(tmp_path, recipe())

    def half(target):
        (target / "config.json").touch()
        raise FULL

    with pytest.raises(OSError, match="No space"):
        space.result("model", half)
    assert [path.name for path in tmp_path.iterdir()] == ["model.partial"]
    space.result("model", lambda target: (target / "README.md").touch())
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")] == ["model/README.md"]


def test_optimizer_states_cut_short_are_not_resumed_from(tmp_path, monkeypatch):
    """torch.save fails after the weights of a checkpoint are there."""
    real = torch.save

    def save(value, path, *args, **kwargs):
        if str(path).endswith("optimizer.pt"):
            (tmp_path / "seen").touch()
            raise FULL_TORCH
        return real(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(CheckpointError, match="could not be written: a file was cut short"):
        compress(recipe(**{"teacher.epochs": 1}), output_dir=tmp_path / "out")
    assert (tmp_path / "seen").exists() and list(tmp_path.glob("out/*/trainer/checkpoint-*/model.safetensors"))
    assert not list(tmp_path.glob("out/*/trainer/*/complete")) and not (tmp_path / "out/0-teacher").exists()


def test_the_folder_can_be_locked_again_after_a_fault(tmp_path, monkeypatch):
    """The lock of a run that failed is let go."""
    asked, space = recipe(), Workspace(tmp_path / "out", recipe())
    monkeypatch.setattr("hf_efficient.pipeline.compress._carry_out", lambda *args: (_ for _ in ()).throw(FULL))
    with pytest.raises(CheckpointError, match="No space left"):
        compress(asked, output_dir=tmp_path / "out")
    space.open(json.loads((tmp_path / "out/inputs.json").read_text()))
    space.close()


def test_a_teacher_cache_on_a_full_disk_goes_on(tmp_path, monkeypatch):
    _, teacher = make_pair("bert")
    real, written = datasets.Dataset.save_to_disk, []

    def save(self, path, *args, **kwargs):
        real(self, path, *args, **kwargs)
        written.append(path)
        if len(written) == 2:
            raise FULL

    monkeypatch.setattr(datasets.Dataset, "save_to_disk", save)
    with pytest.raises(CheckpointError, match=r"cache could not be written: No space left .*call cache_teacher again"):
        make_cache("bert", tmp_path / "cache", teacher)
    names = {path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()}
    assert names == {"shard-00000"}  # and no half of another one that fills the disk
    with pytest.raises(CheckpointError, match="1 of 3 shards"):
        TeacherCache(tmp_path / "cache")
    assert len(make_cache("bert", tmp_path / "cache", teacher)) == 27 and len(written) == 4


def test_a_teacher_cache_that_cannot_begin(tmp_path, monkeypatch):
    _, teacher = make_pair("bert")
    monkeypatch.setattr(type(teacher.config), "save_pretrained", lambda *args: (_ for _ in ()).throw(FULL))
    with pytest.raises(CheckpointError, match="No space left"):
        cache_teacher(teacher, rows_of("bert"), tmp_path / "cache", data_collator=collate_rows)
    with pytest.raises(CheckpointError, match="no teacher cache"):
        TeacherCache(tmp_path / "cache")
    monkeypatch.undo()
    assert len(cache_teacher(teacher, rows_of("bert"), tmp_path / "cache", data_collator=collate_rows)) == 16


def test_an_export_that_was_stopped_leaves_nothing_behind(tmp_path, monkeypatch):
    """Half of it lies in the folder of the stage when the same command is given again."""
    run_stage(recipe(**{"teacher.max_steps": 1}), "teacher", tmp_path, "0-teacher")
    left = tmp_path / "1-export.partial/onnx/model.onnx.data"
    left.parent.mkdir(parents=True)
    left.write_text("half")

    def export(model, kind, folder, **kwargs):
        folder.mkdir()
        (folder / "model.onnx").touch()
        return Exported(kind, "onnxruntime", None, folder, 1, 0.0, 1.0, ())

    monkeypatch.setattr("hf_efficient.runtimes.export.export", export)
    run_stage(recipe(stages=[{"export": {}}]), "export", tmp_path, "1-export.partial")
    assert not left.exists() and (left.parent / "model.onnx").exists()
