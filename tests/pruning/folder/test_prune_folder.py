"""A folder is pruned as the model in memory is: the same plan, the same weights, the same answers; and killed runs go
on."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_efficient import ConfigError, DataError, PruningConfig, PruningPlan, UnsupportedModelError, plan, prune
from hf_efficient.errors import CheckpointError
from hf_efficient.models.loading import load_model
from hf_efficient.models.on_disk import StoredModel
from hf_efficient.pruning.folder import dense, small
from hf_efficient.pruning.folder.dense import DenseModel
from tests.helpers import assert_close

from .. import tiny


def qwen3():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    more = {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": tiny.VOCABULARY, "pad_token_id": 0}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **more, tie_word_embeddings=True)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


MODELS = {
    "llama": lambda: tiny.make("llama"),
    "llama-bf16": lambda: tiny.make("llama").to(torch.bfloat16),
    "qwen3": qwen3,
    "gpt2": lambda: tiny.make("gpt2"),
    "bert": lambda: tiny.make("bert"),
}


def batches_of(name):
    return tiny.batches({"llama-bf16": "llama", "qwen3": "llama"}.get(name, name), 3)


@pytest.fixture
def saved(tmp_path, request):
    """A model, its batches, and its folder, in several shards."""

    def save(name):
        model = MODELS[name]()
        model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
        (tmp_path / "dense" / "tokenizer_config.json").write_text("{}")
        # as it is loaded: a config says what is saved
        return type(model).from_pretrained(tmp_path / "dense").eval(), batches_of(name), tmp_path / "dense"

    return save


CONFIGS = {
    "fisher": PruningConfig(ratio=0.4),
    "uniform": PruningConfig(ratio=0.4, allocation="uniform", importance="taylor"),
    "activation": PruningConfig(ratio=0.4, importance="activation", reconstruct=False),
    "magnitude": PruningConfig(ratio=0.4, importance="magnitude"),
    "random": PruningConfig(ratio=0.4, importance="random", metric="parameters", round_to=4),
    "rearrange": PruningConfig(ratio=0.4, rearrange=True),
    "layers": PruningConfig(ratio=0.3, granularity="layer", importance="block_influence"),
    "layers by fisher": PruningConfig(ratio=0.3, granularity="layer", importance="fisher"),
}


@pytest.mark.cover
@pytest.mark.parametrize("how", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_what_the_model_in_memory_gives(name, how, saved, tmp_path):
    model, batches, folder = saved(name)
    config = CONFIGS[how]
    chosen, expected = plan(model, config, batches), prune(model, config, batches)
    assert prune(folder, config, batches, output_dir=tmp_path / "small") == tmp_path / "small"

    assert replace(plan(folder, config, batches), forecast=None) == replace(chosen, forecast=None)
    result = load_model(type(expected), tmp_path / "small").eval()
    assert type(result) is type(expected) and result.dtype == expected.dtype
    rough = expected.dtype == torch.bfloat16
    for key, weight in expected.state_dict().items():
        assert_close(result.state_dict()[key].float(), weight.float(), 2e-2 if rough else 1e-4, key)
    if not rough:
        assert_close(tiny.logits(result, batches[0]), tiny.logits(expected, batches[0]), 1e-3)
    assert result.num_parameters() < model.num_parameters()
    assert (tmp_path / "small" / "tokenizer_config.json").is_file()
    assert not list(tmp_path.glob(".hf-efficient*")) and not (tmp_path / "small" / "work").exists()


def test_fitting_changes_the_weights_and_needs_batches(saved, tmp_path):
    _, batches, folder = saved("llama")
    config = PruningConfig(ratio=0.4, importance="magnitude")
    for name, rows in (("fitted", batches), ("cut", None)):
        prune(folder, config, rows, output_dir=tmp_path / name)
    fitted, cut = (
        {k: v for f in sorted((tmp_path / name).glob("*.safetensors")) for k, v in load_file(f).items()}
        for name in ("fitted", "cut")
    )
    key = "model.layers.1.mlp.down_proj.weight"
    assert fitted.keys() == cut.keys() and fitted[key].shape == cut[key].shape
    assert not torch.equal(fitted[key], cut[key])
    assert torch.equal(fitted["model.norm.weight"], cut["model.norm.weight"])


def test_a_plan_is_carried_out(saved, tmp_path):
    model, batches, folder = saved("gpt2")
    config = PruningConfig(ratio=0.4)
    chosen = plan(folder, config, batches)
    prune(folder, plan=chosen, calibration=batches, output_dir=tmp_path / "small")
    expected = prune(model, plan=chosen, calibration=batches)
    result = load_model(type(expected), tmp_path / "small")
    assert_close(tiny.logits(result.eval(), batches[0]), tiny.logits(expected, batches[0]), 1e-3)


def test_no_more_than_one_layer_of_the_dense_model_is_there(saved, tmp_path, monkeypatch):
    _, batches, folder = saved("llama")
    most, read = [0], StoredModel.read

    def counted(self, name):
        tensor = read(self, name)
        there = {n.split(".")[2] for n, p in self.model.named_parameters() if ".layers." in n and not p.is_meta}
        most[0] = max(most[0], len(there))
        return tensor

    monkeypatch.setattr(StoredModel, "read", counted)
    prune(folder, PruningConfig(ratio=0.4), batches, output_dir=tmp_path / "small")
    assert most == [1]


class Killed(BaseException):
    """Not an error that anything handles."""


PLACES = ((DenseModel, "_through_layer"), (DenseModel, "_through_head"), (small.SmallModel, "_layer"))


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])
def test_a_killed_run_goes_on(place, after, saved, tmp_path, monkeypatch):
    _, batches, folder = saved("llama")
    config = PruningConfig(ratio=0.4)
    prune(folder, config, batches, output_dir=tmp_path / "whole")
    owner, name = place
    usual, count = getattr(owner, name), [0]

    def counted(self, *args):
        count[0] += 1
        if count[0] > after:
            raise Killed
        return usual(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, counted)
        prune(folder, config, batches, output_dir=tmp_path / "small")
        raise Killed  # the head is passed once
    begun = tmp_path / ".hf-efficient-small"
    if not (tmp_path / "small").exists():
        assert begun.is_dir()
        with pytest.raises(CheckpointError, match="another call"):
            prune(folder, PruningConfig(ratio=0.3), batches, output_dir=tmp_path / "small")
        done = []
        monkeypatch.setattr(owner, name, lambda self, *args: done.append(1) or usual(self, *args))
        prune(folder, config, batches, output_dir=tmp_path / "small")
        assert len(done) == {"_through_head": 1}.get(name, 3 - after)
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        expected, found = load_file(shard), load_file(tmp_path / "small" / shard.name)
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_rows_go_through_the_head_in_portions(saved, tmp_path, monkeypatch):
    _, batches, folder = saved("llama")
    config = PruningConfig(ratio=0.4)
    whole = plan(folder, config, batches)
    monkeypatch.setattr(dense, "LOGITS", 1)
    assert plan(folder, config, batches) == whole


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (PruningConfig(granularity="weight", importance="magnitude"), "single weights"),
        (PruningConfig(granularity="expert", importance="random"), "whole experts"),
        (PruningConfig(metric="latency"), "latency"),
        (PruningConfig(steps=2), "steps=2"),
        (PruningConfig(granularity=("layer", "head", "neuron")), "layers and units"),
        (PruningConfig(granularity="layer"), "importance='loss'"),
        (PruningConfig(importance="obs"), "importance='obs'"),
    ],
)
def test_what_takes_the_whole_model_is_refused_before_the_work(config, words, saved, tmp_path, monkeypatch):
    _, batches, folder = saved("llama")
    monkeypatch.setattr(StoredModel, "read", lambda *_: pytest.fail("work has begun"))
    with pytest.raises(ConfigError, match=words):
        prune(folder, config, batches, output_dir=tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_calls_that_make_no_sense(saved, tmp_path):
    model, batches, folder = saved("llama")
    config = PruningConfig(ratio=0.4)
    with pytest.raises(ConfigError, match="output_dir"):
        prune(folder, config, batches)
    with pytest.raises(ConfigError, match="save_pretrained"):
        prune(model, config, batches, output_dir=tmp_path / "small")
    with pytest.raises(DataError, match="needs calibration"):
        prune(folder, config, output_dir=tmp_path / "small")
    with pytest.raises(CheckpointError, match="no folder here"):
        prune("not/there", config, batches, output_dir=tmp_path / "small")
    with pytest.raises(ConfigError, match="The plan keeps"):
        prune(folder, plan=PruningPlan(units={"decoder.0.heads": (7,)}), output_dir=tmp_path / "small")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        prune(folder, config, batches, output_dir=tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_models_whose_layers_hand_something_on_are_refused(tmp_path):
    tiny.make("t5").save_pretrained(tmp_path / "t5")
    tiny.make("vit").save_pretrained(tmp_path / "vit")
    with pytest.raises(UnsupportedModelError, match="one by one"):
        prune(tmp_path / "t5", PruningConfig(importance="magnitude"), output_dir=tmp_path / "small")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    MixtralForCausalLM(MixtralConfig(**sizes, intermediate_size=32, vocab_size=40)).save_pretrained(
        tmp_path / "mixtral"
    )
    for name in ("mixtral", "vit"):  # stored under other names than those that they have in memory
        with pytest.raises(UnsupportedModelError, match="another form"):
            prune(tmp_path / name, PruningConfig(importance="magnitude"), output_dir=tmp_path / "small")


def test_a_disk_that_is_too_small_is_told_before_the_work(saved, tmp_path, monkeypatch):
    _, batches, folder = saved("llama")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(DenseModel, "forward", lambda _: pytest.fail("work has begun"))
    with pytest.raises(CheckpointError, match="are needed"):
        prune(folder, PruningConfig(ratio=0.4), batches, output_dir=tmp_path / "small")


def test_damaged_weights_are_told(saved, tmp_path):
    _, batches, folder = saved("llama")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    key = "model.layers.1.mlp.down_proj.weight"
    weights = load_file(folder / index[key])
    weights[key][0, 0] = float("nan")
    save_file(weights, folder / index[key], {"format": "pt"})
    with pytest.raises(CheckpointError, match="not finite"):
        prune(folder, PruningConfig(ratio=0.4), batches, output_dir=tmp_path / "small")


def test_tied_weights_and_the_prefix_of_a_base_model(tmp_path):
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "tied")
    stored = StoredModel.open(tmp_path / "tied")
    assert stored.aliases == {"model.embed_tokens.weight": ("lm_head.weight",)} and stored.model.device.type == "meta"
    inputs = {"input_ids": torch.arange(6)[None]}
    with stored.loaded(""):
        assert torch.equal(stored.model(**inputs).logits, model(**inputs).logits)
    assert all(parameter.is_meta for parameter in stored.model.parameters())
    weights = {
        key.removeprefix("model."): value for key, value in load_file(tmp_path / "tied/model.safetensors").items()
    }
    save_file(weights, tmp_path / "tied/model.safetensors", {"format": "pt"})
    assert StoredModel.open(tmp_path / "tied").tensors.keys() == stored.tensors.keys()
