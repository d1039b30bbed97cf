"""Files that were cut short or lost after they were written: the error names them and says what to do."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from hf_efficient import CheckpointError, HfEfficientError, TeacherCache, compress
from hf_efficient.pipeline.run import Run

from ..distillation.caching import make_cache
from ..distillation.tiny import collate, examples, make_pair
from .tiny import recipe, run_stages

SHORT = {"teacher.max_steps": 1, "distill.max_steps": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    run_stages(recipe(**SHORT), folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def cut(path, part=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])


@pytest.mark.parametrize("part", [0, 0.001, 0.5, 0.99])
def test_weights_of_a_stage_that_were_cut_short(folder, part):
    cut(folder / "2-distill/model.safetensors", part)
    with pytest.raises(CheckpointError, match=r"finished stage.*delete the folder \S*2-distill to run it again"):
        compress(recipe(**SHORT), output_dir=folder)


def test_done_as_told_it_goes_on_to_the_same_weights(folder, finished):
    cut(folder / "1-prune/model.safetensors")
    asked = recipe(**SHORT)
    shutil.rmtree(folder / "2-distill")
    with pytest.raises(CheckpointError, match=r"delete the folder \S*1-prune to run it again"):
        compress(asked, output_dir=folder)
    shutil.rmtree(folder / "1-prune")
    run_stages(asked, folder)
    for name in ("1-prune", "2-distill"):
        weights = [(each / name / "model.safetensors").read_bytes() for each in (folder, finished)]
        assert weights[0] == weights[1]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_files_of_a_stage_that_are_gone(folder, name):
    (folder / "2-distill" / name).unlink()
    with pytest.raises(CheckpointError, match="finished stage"):
        compress(recipe(**SHORT), output_dir=folder)


@pytest.mark.parametrize("stage", ["0-teacher", "2-distill"])
def test_a_stage_that_lost_a_tensor_is_not_published(stage, folder):
    path = folder / stage / "model.safetensors"
    weights = load_file(path)
    del weights[next(name for name in sorted(weights) if ".0." in name)]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"lacks .*finished stage.*delete the folder \S*{stage} to run it again"
    ):
        compress(recipe(**SHORT), output_dir=folder)
    assert not (folder / "model").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b"[]", b"null", b"[" * 10**5, b'{"rows": "\\ud800"}'])
def test_what_went_in_is_damaged(content, folder):
    (folder / "inputs.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"inputs\.json"):
        compress(recipe(**SHORT), output_dir=folder)


def test_a_model_that_is_no_stage_gets_no_advice_about_stages(tmp_path, folder):
    shutil.copytree(folder / "2-distill", tmp_path / "mine")
    cut(tmp_path / "mine/model.safetensors")
    with pytest.raises(CheckpointError, match="Cannot load") as caught:
        Run(recipe(), folder).load(tmp_path / "mine")
    assert "finished stage" not in str(caught.value)


DAMAGED = ["", "{", "null", "[]", "\0" * 100, '{"schema_version": 1}', '{"schema_version": 1, "name": 3}', "[" * 10**5]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_manifest_of_a_stage_that_is_damaged(folder, text):
    (folder / "1-prune/stage.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"stage.json is damaged.*Delete the folder \S*1-prune to run this"):
        compress(recipe(**SHORT), output_dir=folder)


def test_a_stage_without_its_manifest_is_not_worked_on_in_vain(folder):
    """Its folder would be in the way when the work is done."""
    (folder / "1-prune/stage.json").unlink()
    with pytest.raises(CheckpointError, match=r"1-prune has no stage.json. Delete the folder"):
        compress(recipe(**SHORT), output_dir=folder)
    assert not (folder / "1-prune.partial").exists()


@pytest.mark.parametrize("name", ["recipe.yaml", "inputs.json"])
def test_notes_of_a_run_that_are_damaged(folder, name):
    cut(folder / name)
    with pytest.raises(HfEfficientError, match=name):
        compress(recipe(**SHORT), output_dir=folder)


# ---- teacher caches -------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path):
    teacher = make_pair("bert")[1]
    make_cache("bert", tmp_path / "cache", teacher)
    return teacher, tmp_path / "cache"


def lose(name):
    return lambda shard: (shard / name).unlink()


def cut_table(part):
    return lambda shard: cut(next(shard.glob("*.arrow")), part)


@pytest.mark.parametrize(
    "damage",
    [cut_table(0), cut_table(0.3), cut_table(0.9), lose("state.json"), lose("dataset_info.json")],
    ids=["empty", "short", "nearly whole", "no state", "no info"],
)
def test_a_damaged_shard_of_a_teacher_cache(damage, cache):
    teacher, folder = cache
    expected = TeacherCache(folder).find(collate(examples("bert")))["teacher_logits"]
    damage(folder / "shard-00001")
    for read in (lambda: TeacherCache(folder), lambda: make_cache("bert", folder, teacher)):
        with pytest.raises(CheckpointError, match=r"shard-00001 is damaged .*Delete that folder"):
            read()
    shutil.rmtree(folder / "shard-00001")
    again = make_cache("bert", folder, teacher)
    assert again.find(collate(examples("bert")))["teacher_logits"].equal(expected)


def test_shards_that_were_swapped_for_shorter_ones(cache):
    _, folder = cache
    shutil.rmtree(folder / "shard-00000")
    shutil.copytree(folder / "shard-00002", folder / "shard-00000")  # of 7 examples
    with pytest.raises(CheckpointError, match=r"shard-00000 is damaged .*7 of 10 examples"):
        TeacherCache(folder)
