"""A cache that is not as it was written is refused; one that is, whoever wrote it, is read."""

import json
import logging
import shutil

import pytest
import torch

from hf_efficient.distillation.cache.cache import MAX_SHARDS, Manifest, TeacherCache
from hf_efficient.distillation.cache.write import fingerprint
from hf_efficient.errors import CheckpointError, ConfigError
from hf_efficient.runtimes.quantization import quantize

from ..caching import make_cache
from ..tiny import collate, examples, make_pair
from ..training import make_trainer


def flip(path, place):
    """One bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def rewrite(folder, **changes):
    """Other fields in the manifest; `layout__top_k` is one of the layout."""
    path = folder / "cache.json"
    values = json.loads(path.read_text())
    for name, value in changes.items():
        inner, _, field = name.rpartition("__")
        (values[inner] if inner else values)[field] = value
    path.write_text(json.dumps(values))


def as_first_version(folder):
    """What earlier versions wrote: no digests."""
    values = json.loads((folder / "cache.json").read_text())
    del values["config"]
    (folder / "cache.json").write_text(json.dumps(values | {"version": 1}))
    for file in folder.glob("*/shard.json"):
        file.unlink()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "cache"
    make_cache("llama", folder, make_pair("llama")[1], top_k=4, temperature=2.0)
    return folder


@pytest.fixture
def cache(made, tmp_path):
    return shutil.copytree(made, tmp_path / "cache")


@pytest.mark.parametrize("place", [0.0, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("file", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json", "shard.json"])
def test_one_flipped_bit_is_found(cache, file, place):
    assert len(TeacherCache(cache)) == 27
    flip(cache / "shard-00001" / file, place)
    with pytest.raises(CheckpointError, match="shard-00001"):
        TeacherCache(cache)
    with pytest.raises(CheckpointError, match="shard-00001"):  # nor is it kept by a call that goes on
        make_cache("llama", cache, make_pair("llama")[1], top_k=4, temperature=2.0)
    shutil.rmtree(cache / "shard-00001")
    assert len(make_cache("llama", cache, make_pair("llama")[1], top_k=4, temperature=2.0)) == 27


@pytest.mark.parametrize("other", ["teacher", "settings"])
def test_shard_of_another_cache_is_found(cache, tmp_path, other):
    _, teacher = make_pair("llama")
    if other == "teacher":
        with torch.no_grad():
            teacher.lm_head.weight.mul_(2)
    make_cache("llama", tmp_path / "other", teacher, top_k=4, temperature=2.0 if other == "teacher" else 3.0)
    shutil.rmtree(cache / "shard-00002")
    shutil.copytree(tmp_path / "other" / "shard-00002", cache / "shard-00002")
    for action in (
        TeacherCache,
        lambda folder: make_cache("llama", folder, make_pair("llama")[1], top_k=4, temperature=2.0),
    ):
        with pytest.raises(CheckpointError, match="another teacher or of other settings"):
            action(cache)
    shutil.rmtree(cache / "shard-00002")
    make_cache("llama", tmp_path / "same", make_pair("llama")[1], top_k=4, temperature=2.0)
    shutil.copytree(tmp_path / "same" / "shard-00002", cache / "shard-00002")
    assert len(TeacherCache(cache)) == 27


def test_shard_without_its_digests_is_refused(cache):
    (cache / "shard-00000" / "shard.json").unlink()
    with pytest.raises(CheckpointError, match="shard-00000"):
        TeacherCache(cache)


@pytest.mark.parametrize("name", ["extra.arrow", "notes.txt"])
def test_files_of_others_in_a_shard(cache, name):
    """What is never read may lie there; a table may not."""
    (cache / "shard-00000" / name).write_text("mine")
    if name == "notes.txt":
        assert len(TeacherCache(cache)) == 27
        return
    with pytest.raises(CheckpointError, match="not its own"):
        TeacherCache(cache)


def test_config_of_another_teacher_is_refused(cache, tmp_path):
    student, _ = make_pair("llama")
    settings = {"losses": {"kd": 1.0}, "temperature": 2.0}
    make_trainer("llama", tmp_path, pair=(student, TeacherCache(cache)), **settings)
    config = json.loads((cache / "config.json").read_text())
    (cache / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    with pytest.raises(CheckpointError, match=r"config\.json is not the file"):
        make_trainer("llama", tmp_path, pair=(student, TeacherCache(cache)), **settings)


# ---- the first version, which had no digests ------------------------------------------------------------------------


def test_cache_without_digests_is_read_with_a_warning(cache, caplog):
    batch = collate(examples("llama"))
    expected = TeacherCache(cache).find(batch)
    assert not caplog.records
    as_first_version(cache)
    with caplog.at_level(logging.WARNING):
        found = TeacherCache(cache).find(batch)
    assert "without digests" in caplog.text
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    TeacherCache(cache).skeleton()


def test_cache_without_digests_is_continued(cache):
    as_first_version(cache)
    shutil.rmtree(cache / "shard-00001")
    with pytest.raises(CheckpointError, match="2 of 3 shards"):
        TeacherCache(cache)
    assert len(make_cache("llama", cache, make_pair("llama")[1], top_k=4, temperature=2.0)) == 27


@pytest.mark.parametrize(
    "changes", [{"layout__top_k": 5}, {"layout__dtype": "float16"}, {"layout__classes": 70000}, {"shard_size": 9}]
)
def test_cache_without_digests_still_has_to_fit_its_manifest(cache, changes):
    as_first_version(cache)
    rewrite(cache, **changes)
    with pytest.raises(CheckpointError, match=r"shard-00000 is damaged|of 3 shards"):
        TeacherCache(cache)


# ---- manifests ------------------------------------------------------------------------------------------------------

BAD = [
    {"rows": "16"},
    {"rows": -5},
    {"rows": 0},
    {"rows": 10**12},
    {"rows": 10**400},
    {"rows": True},
    {"shard_size": 0},
    {"shard_size": 2.5},
    {"inputs": []},
    {"inputs": "input_ids"},
    {"inputs": [3]},
    {"model_class": None},
    {"teacher": ["a"]},
    {"config": ""},
    {"more": 1},
    {"layout": []},
    {"layout__dtype": "object"},
    {"layout__dtype": ">f4"},
    {"layout__top_k": 10**9},
    {"layout__top_k": 0},
    {"layout__sampled": 3},
    {"layout__classes": -1},
    {"layout__classes": 10**12},
    {"layout__hidden_size": 10**9},
    {"layout__hidden_states": [10**9]},
    {"layout__hidden_states": {"a": 1}},
    {"layout__pooling": "max"},
    {"layout__temperature": 0},
    {"layout__temperature": "hot"},
    {"layout__temperature": "nan"},
    {"layout__temperature": 1e30},
    {"layout__task": None},
    {"layout__task": {"kind": "poems", "problem": None, "num_labels": 0}},
    {"layout__task": {"kind": "causal_lm", "problem": None, "num_labels": 0, "stacks": ["decoder", "encoder"]}},
]


@pytest.mark.parametrize("changes", BAD, ids=str)
@pytest.mark.parametrize("sealed", [True, False])
def test_bad_manifest_is_one_clear_error(cache, changes, sealed):
    if not sealed:
        as_first_version(cache)
        if changes == {"config": ""}:  # that is how it is written
            assert len(TeacherCache(cache)) == 27
            return
    rewrite(cache, **changes)
    with pytest.raises(CheckpointError, match=r"cache\.json is damaged"):
        TeacherCache(cache)


@pytest.mark.parametrize("text", ["", "null", "[]", "{", '"a"', "[" * 5000, '{"format": []}', "\ud800"])
def test_manifest_that_is_none(cache, text):
    (cache / "cache.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError):
        TeacherCache(cache)


@pytest.mark.parametrize("changes", [{"layout__temperature": 2.5}, {"teacher": "0" * 64}, {"layout__pooling": "cls"}])
def test_other_manifest_for_the_same_shards_is_refused(cache, changes):
    """Values that could be right, but are not those of the shards."""
    rewrite(cache, **changes)
    with pytest.raises(CheckpointError, match="another teacher or of other settings"):
        TeacherCache(cache)


@pytest.mark.parametrize(
    "name",
    [
        "pipeline",
        "AutoModel",
        "LlamaConfig",
        "PreTrainedModel",
        "Trainer",
        "logging",
        "GPT2LMHeadModel",
        "Nothing",
        "",
    ],
)
def test_class_of_a_teacher_is_a_model_class(cache, name):
    as_first_version(cache)
    TeacherCache(cache).skeleton()
    rewrite(cache, model_class=name)
    with pytest.raises(CheckpointError, match="not a model of"):
        TeacherCache(cache).skeleton()


def test_inputs_are_those_of_the_teacher(cache):
    as_first_version(cache)
    rewrite(cache, inputs=["input_ids", "self_destruct"])
    with pytest.raises(CheckpointError, match="self_destruct"):
        TeacherCache(cache).skeleton()


def test_too_many_shards_are_refused_before_the_teacher_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_efficient.distillation.cache.write.MAX_SHARDS", 2)
    _, teacher = make_pair("llama")
    with pytest.raises(ConfigError, match="shard_size=10"):
        make_cache("llama", tmp_path / "cache", teacher, top_k=4)
    assert not (tmp_path / "cache").exists()
    assert len(make_cache("llama", tmp_path / "cache", teacher, top_k=4, shard_size=14)) == 27
    assert len(Manifest.read(tmp_path / "cache").shards) == 2 < MAX_SHARDS


# ---- the teacher ----------------------------------------------------------------------------------------------------


def test_teacher_gets_its_mode_back(tmp_path):
    _, teacher = make_pair("bert")
    teacher.train()
    teacher.bert.encoder.layer[1].eval()
    before = {name: module.training for name, module in teacher.named_modules()}
    assert len({*before.values()}) == 2
    make_cache("bert", tmp_path / "cache", teacher)
    assert {name: module.training for name, module in teacher.named_modules()} == before


@pytest.mark.parametrize("method", ["int8", "int8_dynamic", "int4"])
def test_quantised_teacher_is_cached(tmp_path, method):
    """Its fingerprint is that of its integers: the same after a reload, another where one of them changes."""
    _, teacher = make_pair("bert")
    small = quantize(teacher.float(), method, group_size=8)
    small.save_pretrained(tmp_path / "small")
    again = type(teacher).from_pretrained(tmp_path / "small").eval()
    assert fingerprint(again) == fingerprint(small) != fingerprint(teacher)
    cache = make_cache("bert", tmp_path / "cache", small)
    assert len(make_cache("bert", tmp_path / "cache", again)) == 27
    batch = collate(examples("bert"))
    with torch.no_grad():
        expected = small(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    assert torch.allclose(cache.find(batch)["teacher_logits"], expected, atol=1e-5)
    assert type(cache.skeleton()) is type(teacher)
    again.bert.encoder.layer[0].attention.self.query.weight.qdata[0, 0] += 1
    assert fingerprint(again) != fingerprint(small)
    with pytest.raises(CheckpointError, match="another teacher"):
        make_cache("bert", tmp_path / "cache", again)
