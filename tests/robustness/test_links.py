"""Links that somebody put into a folder of ours, and files of a user that have a name we could have used."""

import json
import os
import shutil

import pytest

from hf_efficient import CheckpointError, compress
from hf_efficient.io.disk import check_inside, copy_folder, inside, own_file, own_folder, remove_own, write_atomic
from hf_efficient.models.saving import write_loader
from hf_efficient.pipeline.hub import push
from hf_efficient.pipeline.sweep import sweep
from hf_efficient.pipeline.workspace import Workspace
from hf_efficient.runtimes.export import export
from hf_efficient.runtimes.formats import FORMATS

from ..families import make_model
from ..reporting.samples import sample_report
from ..runtimes.copied import Copied
from .tiny import recipe, run_stages

pytestmark = pytest.mark.usefixtures("quick_end")
SHORT = {"teacher.max_steps": 1, "distill.max_steps": 1}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run whose stages are finished, and whose end is still to come."""
    folder = tmp_path_factory.mktemp("begun") / "out"
    run_stages(recipe(**SHORT), folder)
    return folder


@pytest.fixture
def folder(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def precious(tmp_path):
    folder = tmp_path / "precious"
    folder.mkdir()
    for name in ("keep.txt", "model.safetensors", "config.json"):
        (folder / name).write_text("years of work")
    yield folder
    names = {path.name: path.read_text() for path in folder.iterdir()}
    assert names == dict.fromkeys(("keep.txt", "model.safetensors", "config.json"), "years of work")


def again(folder, **options):
    return compress(recipe(**SHORT), output_dir=folder, **options)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "trainer", "deeper/weights.bin"])
def test_a_link_in_the_folder_of_a_stage_that_was_stopped(name, folder, precious):
    """What the stage writes would go through it."""
    shutil.rmtree(folder / "2-distill")
    link = folder / "2-distill.partial" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(precious if name == "trainer" else precious / "keep.txt")
    with pytest.raises(CheckpointError, match=f"{name} is a link.*Remove it"):
        again(folder)
    link.unlink()
    assert again(folder).student


@pytest.mark.parametrize(
    "name", ["2-distill/model.safetensors", "2-distill/notes.txt", "1-prune/stage.json", "2-distill"]
)
def test_a_finished_stage_that_lies_elsewhere_is_not_published(name, folder, precious):
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(precious if name == "2-distill" else precious / "keep.txt")
    with pytest.raises(CheckpointError, match="leads out of"):
        again(folder)
    assert not (folder / "model").exists()


def test_links_that_stay_inside_are_fine(folder):
    (folder / "2-distill/model.safetensors").rename(folder / "2-distill/weights")
    (folder / "2-distill/model.safetensors").symlink_to("weights")
    expected = (folder / "2-distill/weights").read_bytes()
    again(folder)
    made = folder / "model/model.safetensors"
    assert made.read_bytes() == expected and not made.is_symlink()


def test_the_whole_folder_may_be_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    again(tmp_path / "link")
    assert (folder / "model/report.json").is_file()


@pytest.mark.parametrize("name", [".inputs.json.tmp", ".stage.json.tmp", "model.tmp"])
def test_names_that_we_could_have_used_for_what_is_temporary(name, folder, precious):
    (folder / name).symlink_to(precious / "keep.txt")
    again(folder)
    assert (folder / name).is_symlink()


@pytest.mark.parametrize("kind", ["link", "link to nowhere", "folder", "pipe"])
def test_a_lock_that_is_none(kind, folder, precious):
    lock = folder / ".lock"
    lock.unlink(missing_ok=True)
    {
        "link": lambda: lock.symlink_to(precious / "keep.txt"),
        "link to nowhere": lambda: lock.symlink_to(precious / "new.txt"),
        "folder": lock.mkdir,
        "pipe": lambda: os.mkfifo(lock),
    }[kind]()
    with pytest.raises(CheckpointError, match=r"\.lock is a link or a folder.*Remove it"):
        again(folder)


def test_a_link_where_a_combination_of_a_sweep_lies(tmp_path, precious):
    asked = recipe(**SHORT, sweep={"prune.ratio": [0.3, 0.4]})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/recipe.yaml").write_text(asked.to_yaml())
    (tmp_path / "out/ratio=0.3").symlink_to(precious)
    with pytest.raises(CheckpointError, match="leads out of"):
        sweep(asked, output_dir=tmp_path / "out")


def test_two_sweeps_cannot_share_a_folder(tmp_path):
    asked = recipe(**SHORT, sweep={"prune.ratio": [0.3, 0.4]})
    first = Workspace(tmp_path / "out", asked)
    first.open({})
    with pytest.raises(CheckpointError, match="Another process"):
        sweep(asked, output_dir=tmp_path / "out")
    first.close()


def test_a_run_that_another_one_has_ended_meanwhile(folder, monkeypatch):
    """Between the first look and the lock; its result is given, and stays."""
    lines, taken = [], []
    real = Workspace.open

    def slow(self, inputs):
        monkeypatch.setattr(Workspace, "open", real)
        taken.append(again(folder))
        self.open(inputs)

    monkeypatch.setattr(Workspace, "open", slow)
    report = again(folder, announce=lines.append)
    assert report == taken[0] and "is finished" in lines[-1]


def test_another_recipe_that_began_there_meanwhile(tmp_path):
    first, second = (Workspace(tmp_path / "out", recipe(seed=seed)) for seed in (1, 2))
    first.open({})
    first.close()
    with pytest.raises(CheckpointError, match="another recipe"):
        second.open({})
    first.open({})  # and the lock was let go
    first.close()


def test_a_result_that_something_else_made_meanwhile_is_kept(tmp_path):
    space = Workspace(tmp_path, recipe())

    def work(target):
        (target / "ours").touch()
        (tmp_path / "model").mkdir()
        (tmp_path / "model/theirs").touch()

    with pytest.raises(CheckpointError, match=r"model was made by something else.*model\.partial"):
        space.result("model", work)
    assert (tmp_path / "model/theirs").exists() and (tmp_path / "model.partial/ours").exists()


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A model, and the folder of a program that computes the same."""
    model = make_model("bert", num_hidden_layers=1)
    return model, export(model, "torch", tmp_path_factory.mktemp("program") / "out").folder


@pytest.mark.parametrize("name", ["onnx.partial", "onnx.tmp", ".onnx.partial", "onnx~"])
def test_an_export_leaves_its_neighbours_alone(name, program, tmp_path, monkeypatch):
    model, folder = program
    monkeypatch.setitem(FORMATS, "torch", Copied(folder))
    neighbour = tmp_path / name
    neighbour.mkdir()
    (neighbour / "thesis.txt").write_text("years of work")
    made = export(model, "torch", tmp_path / "onnx")
    assert made.folder == tmp_path / "onnx" and made.bytes_on_disk > 0
    assert (neighbour / "thesis.txt").read_text() == "years of work"
    monkeypatch.setattr("hf_efficient.runtimes.export.SAME", -1.0)
    with pytest.raises(ValueError, match="another output"):
        export(model, "torch", tmp_path / "second")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "onnx"])


def test_an_export_into_a_folder_that_is_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export(make_model("bert", num_hidden_layers=1), "torch", tmp_path / "link")
    assert any((tmp_path / "real").iterdir()) and (tmp_path / "link").is_symlink()


def test_the_loader_is_not_written_through_a_link(tmp_path, precious):
    for name in ("modeling_hf_efficient.py", "modeling_hf_efficient.tmp"):
        (tmp_path / name).symlink_to(precious / "keep.txt")
    made = write_loader(tmp_path)
    assert not made.is_symlink() and "hf_efficient" in made.read_text()
    assert (tmp_path / "modeling_hf_efficient.tmp").is_symlink()


@pytest.fixture
def result(tmp_path):
    folder = tmp_path / "run/model"
    make_model("bert").save_pretrained(folder)
    sample_report().save(folder)
    return folder.parent


@pytest.mark.parametrize("name", ["notes.txt", "onnx", "onnx/model.onnx", "README.md"])
def test_a_push_does_not_publish_what_lies_elsewhere(name, result, precious):
    link = result / "model" / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(precious if name == "onnx" else precious / "keep.txt")
    with pytest.raises(CheckpointError, match="leads out of"):
        push(result, "me/fast", dry_run=True)
    link.unlink()
    assert push(result, "me/fast", dry_run=True).files


def test_nor_a_result_that_is_a_link(result, tmp_path):
    (result / "model").rename(tmp_path / "private")
    (result / "model").symlink_to(tmp_path / "private")
    with pytest.raises(CheckpointError, match="leads out of"):
        push(result, "me/fast", dry_run=True)
    assert push(tmp_path / "private", "me/fast", dry_run=True).files  # named by its owner


def test_what_is_inside(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "out.txt").touch()
    (tmp_path / "a/in").symlink_to("b")
    (tmp_path / "a/up").symlink_to("..")
    for name in ("b", "in", "in/new", "new", ".", "b/../b"):
        assert inside(tmp_path / "a", name) == tmp_path / "a" / name
    for name in ("..", "../out.txt", "up", "up/out.txt", "b/../../out.txt", "/etc", str(tmp_path / "out.txt")):
        with pytest.raises(CheckpointError, match="leads out of"):
            inside(tmp_path / "a", name)
    with pytest.raises(CheckpointError, match="leads out of"):
        check_inside(tmp_path / "a")
    (tmp_path / "a/up").unlink()
    check_inside(tmp_path / "a")


def test_what_is_our_own(tmp_path, precious):
    (tmp_path / "link").symlink_to(precious)
    remove_own(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    for own in (own_folder, own_file):
        with pytest.raises(CheckpointError, match="is a link"):
            own(tmp_path / "link")
    made = own_folder(tmp_path / "new")
    (made / "half").touch()
    assert own_folder(made) == made and (made / "half").exists()
    remove_own(made)
    assert not made.exists()
    write_atomic(tmp_path / "link", "text")  # replaces the link
    assert (tmp_path / "link").read_text() == "text"


def test_a_folder_again(tmp_path):
    source = tmp_path / "source"
    (source / "deep/er").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "stage.json", "deep/er/x.bin"):
        (source / name).write_text(json.dumps(name))
    (source / "twin").symlink_to("config.json")
    copy_folder(source, tmp_path / "target", leave_out=("stage.json",))
    made = {str(path.relative_to(tmp_path / "target")) for path in (tmp_path / "target").rglob("*") if path.is_file()}
    assert made == {"model.safetensors", "config.json", "deep/er/x.bin", "twin"}
    one, two = (each / "model.safetensors" for each in (source, tmp_path / "target"))
    assert one.stat().st_ino == two.stat().st_ino  # its space is not used twice
    assert not os.path.samefile(source / "config.json", tmp_path / "target/config.json")
    assert not (tmp_path / "target/twin").is_symlink()


@pytest.mark.parametrize("name", [b"\xff", b"out\x80", b"\xc3("])
def test_a_folder_whose_name_is_not_utf_8_is_refused_before_any_work(name, tmp_path):
    target = tmp_path / os.fsdecode(name) / "deeper"
    asked = recipe(**SHORT)
    for work in (
        lambda: compress(asked, output_dir=target),
        lambda: sweep(recipe(**SHORT, sweep={"prune.ratio": [0.3]}), output_dir=target),
        lambda: export(make_model("bert"), "torch", target),
    ):
        with pytest.raises(CheckpointError, match="is not UTF-8") as caught:
            work()
        str(caught.value).encode("utf-8")  # it can be shown
    assert not list(tmp_path.iterdir())
