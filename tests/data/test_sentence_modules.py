"""What lies beside a transformer of sentence-transformers: read in the forms of all its versions, and not trusted."""

import json
import os

import pytest

from hf_efficient import CheckpointError, UnsupportedModelError
from hf_efficient.data.bundled import bundled_model, resolve_model
from hf_efficient.data.sentence_modules import new_modules, read_modules, transformer_folder
from hf_efficient.models.loading import load_sentence_modules
from hf_efficient.models.pooling import POOLINGS
from hf_efficient.models.sentences import modules_of

OLD = "sentence_transformers.models."
NAMES = {"mean": "mean", "cls": "cls", "last": "lasttoken", "weighted_mean": "weightedmean"}


def listed(*kinds, **changes):
    return [
        {"idx": place, "name": str(place), "path": f"{place}_{kind}" * bool(place), "type": OLD + kind} | changes
        for place, kind in enumerate(kinds)
    ]


def folder_of(path, entries, pooling=None, **texts):
    """A chain without weights: `texts`, the content of JSON files by their names without the ending."""
    path.mkdir(parents=True)
    (path / "modules.json").write_text(json.dumps(entries))
    (path / "config.json").write_text("{}")
    texts = {"1_Pooling/config": pooling or {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}} | texts
    for name, content in texts.items():
        (path / f"{name}.json").parent.mkdir(exist_ok=True)
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


CHAIN = listed("Transformer", "Pooling", "Normalize")


def test_a_real_one_is_read_and_a_plain_model_is_none(tmp_path):
    modules = read_modules(bundled_model("minilm-l6"))
    assert (modules.pooling, modules.names, modules.max_length) == ("mean", ["Normalize"], 256)
    assert not (modules.is_new or modules.lowers_case or modules.compares_lengths or modules.notes)
    modules.write(tmp_path, width=384)
    again = read_modules(tmp_path)
    assert again.entries == modules.entries and again.texts == modules.texts
    assert read_modules(tmp_path / "1_Pooling") is None


@pytest.mark.parametrize("ours", POOLINGS)
@pytest.mark.parametrize("form", ["mode", "modes", "flags"])
def test_every_way_to_pool_in_every_form(ours, form, tmp_path):
    theirs = NAMES[ours]
    flag = {"mean": "mean_tokens", "cls": "cls_token"}.get(ours, theirs if ours == "last" else f"{theirs}_tokens")
    said = {"mode": {"pooling_mode": theirs}, "modes": {"pooling_mode": [theirs]}}.get(form)
    said = said or {"pooling_mode_mean_tokens": False, f"pooling_mode_{flag}": True}
    modules = read_modules(folder_of(tmp_path / "in", CHAIN, said))
    assert modules.pooling == ours
    new_modules(ours, normalize=True).write(tmp_path, width=8, max_length=9)
    assert read_modules(tmp_path).pooling == ours and read_modules(tmp_path).max_length == 9


@pytest.mark.parametrize(
    ("pooling", "words"),
    [
        ({"pooling_mode": "max"}, "pools by 'max'. What we know is one of mean, cls, lasttoken, weightedmean"),
        ({"pooling_mode": ["mean", "cls"]}, "pools by 'mean', 'cls'"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, "pools by 'mean', 'max'"),
        ({"pooling_mode": {}}, "pools by {}"),
    ],
)
def test_a_way_to_pool_that_we_do_not_know(pooling, words, tmp_path):
    with pytest.raises(UnsupportedModelError, match=words):
        read_modules(folder_of(tmp_path / "in", CHAIN, pooling))


@pytest.mark.parametrize(
    ("entries", "error", "words"),
    [
        ({}, CheckpointError, "must be a list of 1 to 100 modules, got {}"),
        ([], CheckpointError, "must be a list of 1 to 100 modules"),
        ([3], CheckpointError, "has 3, where a module has a type and a path"),
        ([{"type": None, "path": ""}], CheckpointError, "where a module has a type and a path"),
        ([*CHAIN[:1], CHAIN[1] | {"path": "../elsewhere"}], CheckpointError, "must lie in a folder in this one"),
        ([*CHAIN[:1], CHAIN[1] | {"path": ""}], CheckpointError, "must lie in a folder in this one"),
        ([*CHAIN[:1], CHAIN[1] | {"path": "a\0b"}], CheckpointError, "must lie in a folder in this one"),
        ([*CHAIN[:1], CHAIN[1] | {"path": "a" * 300}], CheckpointError, "must lie in a folder in this one"),
        ([CHAIN[0] | {"path": "/etc"}], CheckpointError, "must lie in a folder in this one"),
        ([CHAIN[0], CHAIN[1], CHAIN[2] | {"path": "1_Pooling"}], CheckpointError, "two modules in one folder"),
        ([CHAIN[0], CHAIN[1] | {"path": "other"}], CheckpointError, "lacks other/config.json"),
        (listed("StaticEmbedding"), UnsupportedModelError, "is a chain of 'StaticEmbedding'"),
        (listed("Transformer", "WeightedLayerPooling", "Pooling"), UnsupportedModelError, "'WeightedLayerPooling'"),
        (listed("Transformer", "Pooling", type="evil.Pooling"), UnsupportedModelError, "chain of 'evil.Pooling'"),
        (listed("Transformer", "Pooling", "Dense"), CheckpointError, "lacks 2_Dense/model.safetensors"),
    ],
)
def test_what_is_no_chain(entries, error, words, tmp_path):
    with pytest.raises(error, match=words):
        read_modules(folder_of(tmp_path / "in", entries))


def test_pickles_and_links_that_lead_out_are_refused(tmp_path):
    folder = folder_of(tmp_path / "in", listed("Transformer", "Pooling", "Dense"), **{"2_Dense/config": {}})
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        read_modules(folder)
    (tmp_path / "secret.json").write_text('{"pooling_mode": "cls"}')
    (folder / "1_Pooling" / "config.json").unlink()
    os.symlink(tmp_path / "secret.json", folder / "1_Pooling" / "config.json")
    with pytest.raises(CheckpointError, match="outside of the folder"):
        read_modules(folder)


def test_a_narrower_model_moves_pooling_and_not_what_computes(tmp_path):
    texts = {"2_Dense/config": {"in_features": 16, "out_features": 4}}
    plain = read_modules(folder_of(tmp_path / "plain", CHAIN))
    plain.write(tmp_path, width=8)
    assert json.loads((tmp_path / "1_Pooling" / "config.json").read_text())["word_embedding_dimension"] == 8
    folder = folder_of(tmp_path / "dense", listed("Transformer", "Pooling", "Dense"), **texts)
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match=r"lacks 2_Dense/model\.safetensors"):  # it holds nothing
        read_modules(folder)
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"linear.weight": zeros(4, 16)}, folder / "2_Dense" / "model.safetensors")
    read_modules(folder).check_width(16)
    with pytest.raises(UnsupportedModelError, match="8 numbers wide, and Dense after pooling expect 16"):
        read_modules(folder).check_width(8)


def test_settings_beside_it(tmp_path):
    settings = {"similarity_fn_name": "dot", "prompts": {"query": "q: ", "document": ""}}
    texts = {"config_sentence_transformers": settings, "sentence_roberta_config": {"do_lower_case": True}}
    modules = read_modules(folder_of(tmp_path / "in", CHAIN[:2], **texts))
    assert modules.lowers_case and modules.compares_lengths and modules.max_length is None
    assert "prompts (query)" in modules.notes[0]
    assert not read_modules(folder_of(tmp_path / "unit", CHAIN, **texts)).compares_lengths


def test_the_transformer_of_an_old_folder_lies_in_it(tmp_path):
    folder = folder_of(tmp_path / "in", [CHAIN[0] | {"path": "0_Transformer"}, *CHAIN[1:]])
    assert transformer_folder(folder) == folder and resolve_model(str(folder)) == str(folder)  # it has a config
    (folder / "0_Transformer").mkdir()
    (folder / "config.json").rename(folder / "0_Transformer" / "config.json")
    (folder / "0_Transformer" / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')
    assert resolve_model(str(folder)) == str(folder / "0_Transformer")
    modules = read_modules(folder)
    assert modules.max_length == 7 and modules.entries[0]["path"] == ""
    assert resolve_model("a\0b") == "a\0b"


def test_those_of_the_hub_are_read_from_its_cache(tmp_path, monkeypatch, caplog):
    """As it lies there: files are links to blobs."""
    for name, path in (("cls", ""), ("old", "0_Transformer")):
        repository = tmp_path / "hub" / f"models--me--{name}"
        entries = [CHAIN[0] | {"path": path}, *CHAIN[1:]]
        snapshot = folder_of(repository / "snapshots" / ("0" * 40), entries, {"pooling_mode": "cls"})
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        (repository / "blobs").mkdir()
        for number, file in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
            file.rename(repository / "blobs" / str(number))
            os.symlink(os.path.relpath(repository / "blobs" / str(number), file.parent), file)
        if path:
            (snapshot / "config.json").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    modules = load_sentence_modules("me/cls")
    assert (modules.pooling, modules.names, modules.is_new) == ("cls", ["Normalize"], False)
    with pytest.raises(CheckpointError, match="hf download me/old --local-dir FOLDER"):
        load_sentence_modules("me/old")
    assert not caplog.text and load_sentence_modules("me/unknown") is None
    assert "modules.json of me/unknown is not in the cache" in caplog.text


PAIRS = listed("Transformer", type="sentence_transformers.base.modules.transformer.Transformer")
SAID = {"model_type": "CrossEncoder", "activation_fn": "torch.nn.Identity", "prompts": {"ask": "q: "}}


def cross_encoder(path, entries=PAIRS, **said):
    texts = {"config_sentence_transformers": SAID | said, "sentence_bert_config": {"max_seq_length": 9}}
    return folder_of(path, entries, **texts)


def test_a_cross_encoder_is_a_transformer_alone(tmp_path):
    modules = read_modules(cross_encoder(tmp_path / "in"))
    assert modules.pooling is None and modules.max_length == 9 and "prompts (ask)" in modules.notes[0]
    modules.check_width(3)
    (tmp_path / "out").mkdir()
    modules.write(tmp_path / "out", width=8)
    assert read_modules(tmp_path / "out").texts == modules.texts
    assert not (tmp_path / "out" / "1_Pooling").exists()
    for changes in (
        {"model_type": "SentenceTransformer"},
        {"entries": listed("Transformer", type="evil.Transformer")},
    ):
        folder = cross_encoder(tmp_path / f"other-{len(changes)}-{next(iter(changes))}", **changes)
        with pytest.raises(UnsupportedModelError, match="Transformer of a CrossEncoder"):
            read_modules(folder)


def test_a_plain_model_becomes_a_cross_encoder(tmp_path):
    new_modules(None).write(tmp_path, width=8, max_length=7)
    modules = read_modules(tmp_path)
    assert modules.pooling is None and modules.max_length == 7 and not modules.notes
    assert json.loads((tmp_path / "sentence_bert_config.json").read_text())["transformer_task"].endswith("fication")


def test_each_task_takes_what_is_its_own(tmp_path):
    vectors, pairs = folder_of(tmp_path / "vectors", CHAIN), cross_encoder(tmp_path / "pairs")
    assert modules_of("text-classification", vectors) is None
    assert modules_of("sentence-embeddings", vectors).pooling == "mean"
    assert modules_of("reranking", vectors).is_new and modules_of("reranking", vectors).pooling is None
    assert not modules_of("reranking", pairs).is_new and modules_of("reranking", None).is_new
    with pytest.raises(UnsupportedModelError, match="is a CrossEncoder"):
        modules_of("sentence-embeddings", pairs)
