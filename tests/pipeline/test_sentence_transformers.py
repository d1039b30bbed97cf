"""Models of sentence-transformers go in and come out as such; the real library loads them, without us if it can."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_efficient import (
    AttentionConfig,
    ConfigError,
    PruningConfig,
    Recipe,
    UnsupportedModelError,
    compress,
    convert_attention,
    prune,
)
from hf_efficient.cli.programs.distill import read as read_distill
from hf_efficient.cli.programs.distill import run as run_distill
from hf_efficient.cli.programs.prune import parse as parse_prune
from hf_efficient.cli.programs.prune import run as run_prune
from hf_efficient.models.pooling import POOLINGS

from ..processes import ROOT
from ..sentences import NARROW, TEXTS, WIDTH, by_hand, chain, load
from .test_tasks_end_to_end import TRAINING, rows_file

PORTABLE = {"prune": {"ratio": 0.4, "granularity": ["layer"], "calibration_samples": 8}}
PLUGIN = {"attention": {"kind": "local", "window": 4}}
DISTILL = {"distill": TRAINING | {"losses": {"embedding": 1.0}}}
FRESH = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(sys.argv[1], device="cpu")
np.save(sys.argv[2], model.encode(json.loads(sys.argv[3])))
assert not any(name.startswith("hf_efficient") for name in sys.modules)
np.save(
    sys.argv[2] + "-trusted.npy",
    SentenceTransformer(sys.argv[4], device="cpu", trust_remote_code=True).encode(json.loads(sys.argv[3])),
)
assert "hf_efficient" in sys.modules
print(json.dumps([model.max_seq_length, model.prompts, model.similarity_fn_name]))
"""

pytestmark = pytest.mark.usefixtures("quick_end")


def recipe(model, *stages, **changes):
    data = {"name_or_path": str(rows_file(model.parent, "sentence-embeddings")), "text_pair_column": "twin"}
    settings = {"name": "tiny", "task": "sentence-embeddings", "model": {"name_or_path": str(model)}, "data": data}
    return Recipe.from_dict(settings | {"stages": list(stages), "measure": {"repeats": 2}} | changes)


def in_a_fresh_process(portable, plugin, tmp_path):
    """What `encode` gives of a portable model where nothing of ours is, and what that says of itself; then of a plugin
    that is trusted."""
    words = [sys.executable, "-c", FRESH, str(portable), str(tmp_path / "v.npy"), json.dumps(TEXTS), str(plugin)]
    home = {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=os.environ | home)
    assert done.returncode == 0, done.stderr[-3000:]
    vectors = [torch.tensor(np.load(tmp_path / name)) for name in ("v.npy", "v.npy-trusted.npy")]
    return *vectors, json.loads(done.stdout.splitlines()[-1])


def test_a_chain_comes_out_as_it_went_in(tmp_path):
    """A portable result in a process without us: pooling, Dense, Normalize, prompts, similarity and length."""
    prompts = {"query": "w1 ", "document": ""}
    source = chain(tmp_path / "in", "cls", dense=True, normalize=True, prompts=prompts, similarity_fn_name="dot")
    report = compress(recipe(source, PORTABLE, DISTILL), output_dir=tmp_path / "out")
    result = tmp_path / "out" / "model"
    assert report.loads_with == "portable" and report.library_name == "sentence-transformers"
    for name in ("1_Pooling/config.json", "2_Dense/config.json", "3_Normalize/config.json", "modules.json"):
        assert json.loads((result / name).read_text()) == json.loads((source / name).read_text()), name
    dense = load_file(source / "2_Dense" / "model.safetensors")
    assert all(torch.equal(dense[key], each) for key, each in load_file(result / "2_Dense/model.safetensors").items())
    plugin = load(source)
    plugin[0].model = convert_attention(plugin[0].model, AttentionConfig("local", window=4))
    plugin.save_pretrained(str(tmp_path / "plugin"))
    vectors, trusted, said = in_a_fresh_process(result, tmp_path / "plugin", tmp_path)
    assert torch.equal(trusted, torch.tensor(plugin.encode(TEXTS)))
    assert said == [12, prompts, "dot"]
    expected = by_hand(load(result), "cls")
    assert vectors.shape == (3, NARROW) and torch.allclose(vectors, expected, atol=1e-6)
    assert not torch.allclose(vectors, by_hand(load(result), "mean"), atol=1e-3)
    assert not torch.allclose(vectors, by_hand(load(source), "cls"), atol=1e-3)  # it is another model
    assert load(result)[0].model.config.num_hidden_layers == 1
    notes = " ".join(report.warnings)
    assert "Dense, Normalize" in notes and "prompts (query)" in notes


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean"])
def test_a_plain_model_comes_out_pooled_as_the_recipe_says(pooling, tmp_path):
    """And so that its vectors have length 1 only where they were taught directions alone."""
    source = chain(tmp_path / "in").with_name("in-plain")
    stages = [PLUGIN, {"distill": DISTILL["distill"] | {"pooling": pooling}}][: 1 + (pooling != "mean")]
    report = compress(recipe(source, *stages), output_dir=tmp_path / "out")
    result = tmp_path / "out" / "model"
    model = load(result)
    vectors = torch.tensor(model.encode(TEXTS))
    assert report.loads_with == "plugin" and vectors.shape == (3, WIDTH)
    assert torch.allclose(vectors, by_hand(model, pooling, length=16), atol=1e-6)
    assert model.max_seq_length == 16
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3)) == (pooling != "mean")
    assert not any(
        torch.allclose(vectors, by_hand(model, other, length=16), atol=1e-3) for other in POOLINGS if other != pooling
    )


def test_the_card_loads_it(tmp_path, capsys):
    source = chain(tmp_path / "in", "lasttoken", normalize=True)
    compress(recipe(source, PLUGIN), output_dir=tmp_path / "out")
    result = tmp_path / "out" / "model"
    card = (result / "README.md").read_text()
    assert "library_name: sentence-transformers\n" in card and "pipeline_tag: sentence-similarity\n" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert code.startswith("import hf_efficient\nfrom sentence_transformers import SentenceTransformer\n")
    capsys.readouterr()
    exec(code.replace("path/to/this/model", str(result)), {})
    first, second = by_hand(load(result), "last", ["A text.", "Another text."])
    assert torch.cosine_similarity(first, second, dim=0).item() == pytest.approx(
        float(re.search(r"tensor\(\[\[(.*)\]\]\)", capsys.readouterr().out)[1]), abs=1e-3
    )


def test_a_longer_model_reads_longer_texts(tmp_path):
    source = chain(tmp_path / "in", normalize=True)
    settings = json.loads((source / "sentence_bert_config.json").read_text())
    (source / "sentence_bert_config.json").write_text(json.dumps(settings | {"max_seq_length": 9}))
    stages = [{"attention": {"kind": "local", "window": 4, "positions": 32}}]
    assert load(source).max_seq_length == 9
    compress(recipe(source), output_dir=tmp_path / "same")
    compress(recipe(source, *stages), output_dir=tmp_path / "longer")
    assert [load(tmp_path / name / "model").max_seq_length for name in ("same", "longer")] == [9, 32]


def test_a_classifier_on_top_of_one_is_a_cross_encoder(tmp_path):
    """The transformer of an old folder, which lies in a folder of its own, gets a head; one label or more."""
    from sentence_transformers import CrossEncoder

    source = chain(tmp_path / "in")
    (source / "0_Transformer").mkdir()
    for path in [*source.glob("*.json"), source / "model.safetensors"]:
        if path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(source / "0_Transformer" / path.name)
    listed = json.loads((source / "modules.json").read_text())
    (source / "modules.json").write_text(json.dumps([listed[0] | {"path": "0_Transformer"}, *listed[1:]]))
    rows = tmp_path / "rows.csv"
    rows.write_text("text,pair,label\n" + "".join(f"w{n},w{n + n % 2},{'xy'[n % 2]}\n" for n in range(1, 25)))
    asked = recipe(
        source,
        PORTABLE,
        task="text-classification",
        data={"name_or_path": str(rows), "text_pair_column": "pair"},
        teacher=TRAINING,
    )
    report = compress(asked, output_dir=tmp_path / "out")
    result = tmp_path / "out" / "model"
    assert report.library_name == "transformers" and not (result / "modules.json").exists()
    scores = CrossEncoder(str(result), device="cpu").predict([("w1", "w2"), ("w3", "w3")])
    assert scores.shape == (2, 2)
    # and as embeddings its transformer comes to lie where newer versions have it
    compress(recipe(source), output_dir=tmp_path / "vectors")
    assert torch.equal(
        torch.tensor(load(tmp_path / "vectors" / "model").encode(TEXTS)), torch.tensor(load(source).encode(TEXTS))
    )


@pytest.mark.parametrize(
    ("said", "stage", "words"),
    [
        ({}, {"pooling": "cls"}, r"stages\[0\].distill.pooling is 'cls', but the model's own Pooling is 'mean'"),
        ({"similarity_fn_name": "dot"}, {}, r"Set stages\[0\].distill.embedding_loss to mse"),
    ],
)
def test_other_vectors_than_those_of_the_model_are_refused(said, stage, words, tmp_path):
    asked = recipe(chain(tmp_path / "in", **said), {"distill": DISTILL["distill"] | stage})
    with pytest.raises(ConfigError, match=words):
        compress(asked, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def words_of(model, command, *more):
    rows = rows_file(model.parent, "sentence-embeddings")
    given = {"dataset": rows, "task": "sentence-embeddings", "output_dir": model.parent / command, "max_length": 12}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))] + list(more)


def test_the_program_that_prunes_writes_the_chain_too(tmp_path):
    source = chain(tmp_path / "in", "cls", dense=True, normalize=True)
    small = ["--model", str(source), "--ratio", "0.3", "--allocation", "uniform", "--round_to", "4"]
    first = run_prune(parse_prune(words_of(source, "small", *small)))
    model = load(tmp_path / "small")
    assert model.max_seq_length == 12 and first[1]["parameters"] < first[0]["parameters"]
    assert torch.allclose(torch.tensor(model.encode(TEXTS)), by_hand(model, "cls"), atol=1e-6)
    layers = ["--model", str(source), "--ratio", "0.3", "--layer_by_layer", "always", "--round_to", "4"]
    run_prune(parse_prune(words_of(source, "by-layer", *layers)))
    assert load(tmp_path / "by-layer").encode(TEXTS).shape == (3, NARROW)


def test_the_program_that_distils_pools_as_the_teacher_does(tmp_path):
    teacher = chain(tmp_path / "in", "lasttoken", normalize=True)
    training = ["--max_steps", "1", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
    narrow = ["--teacher", str(teacher), "--student_layers", "1", "--student_hidden_size", "8", *training]
    script, args = read_distill(words_of(teacher, "student", *narrow))
    assert args.pooling == "last"
    run_distill(script, args)
    model = load(tmp_path / "student")
    assert torch.allclose(torch.tensor(model.encode(TEXTS)), by_hand(model, "last"), atol=1e-6)
    assert model.get_embedding_dimension() == 8
    with pytest.raises(ConfigError, match="pooling is 'cls', but the model's own Pooling is 'last'"):
        run_distill(*read_distill(words_of(teacher, "other", *narrow, "--pooling", "cls")))
    dense = chain(tmp_path / "dense", dense=True)
    with pytest.raises(UnsupportedModelError, match="8 numbers wide, and Dense after pooling expect 16"):
        run_distill(*read_distill(words_of(dense, "third", "--teacher", str(dense), *narrow[2:])))


@pytest.mark.parametrize("kind", ["portable", "plugin"])
def test_a_model_in_memory_is_changed_in_its_place(kind, tmp_path):
    """Pruned within a SentenceTransformer, saved, loaded, and trained by its own trainer."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = load(chain(tmp_path / "in", normalize=True))
    before, layers = model.encode(TEXTS), model[0].model.config.num_hidden_layers
    config = PruningConfig(ratio=0.4, granularity=("layer",)) if kind == "portable" else PruningConfig(0.4, round_to=4)
    batch = model.preprocess(TEXTS)
    batches = [{name: batch[name] for name in ("input_ids", "attention_mask")}]
    model[0].model = prune(model[0].model, config, batches)
    model.save_pretrained(str(tmp_path / "small"))
    again = load(tmp_path / "small")
    assert type(again[0].model).__name__ == ("BertModel" if kind == "portable" else "EfficientBertModel")
    assert (again.encode(TEXTS) == model.encode(TEXTS)).all() and not np.allclose(
        again.encode(TEXTS), before, atol=1e-3
    )
    assert (again[0].model.config.num_hidden_layers < layers) == (kind == "portable")
    rows = Dataset.from_dict({"anchor": ["w1 w2", "w3", "w5"], "positive": ["w2", "w4", "w6"]})
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "training"), max_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True
    )
    loss = MultipleNegativesRankingLoss(again)
    SentenceTransformerTrainer(model=again, args=arguments, train_dataset=rows, loss=loss).train()
    assert not np.allclose(again.encode(TEXTS), model.encode(TEXTS), atol=1e-4)
    again.save_pretrained(str(tmp_path / "trained"))
    assert (load(tmp_path / "trained", truncate_dim=4).encode(TEXTS) == again.encode(TEXTS)[:, :4]).all()
