"""A decoder in ONNX Runtime writes with its cache, token by token what PyTorch writes; layers of any sizes."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM

from hf_efficient import ConfigError, PruningConfig, UnsupportedModelError, convert_attention, export, prune
from hf_efficient.measurement.generation import time_decoding
from hf_efficient.runtimes import decoder as module
from hf_efficient.runtimes import formats
from hf_efficient.runtimes.runtime import Reader, Runtime, Work, measure_export
from hf_efficient.stages.export import ExportStage

from ..attention.tiny import TINY
from ..families import VOCABULARY, make_model
from ..gguf_files import make_llama
from ..helpers import assert_close

for package in formats.FORMATS["onnx"].packages:
    pytest.importorskip(package)


def pruned(allocation):
    torch.manual_seed(0)
    ids = torch.randint(3, 280, (4, 16))
    config = PruningConfig(0.4, reconstruct=False, round_to=1, allocation=allocation)
    return prune(make_llama(intermediate_size=128), config, [{"input_ids": ids, "labels": ids}]).eval()


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    model = pruned("global")
    assert {layer.self_attn.k_proj.out_features for layer in model.model.layers} == {32, 16}
    return model, export(model, "onnx", tmp_path_factory.mktemp("uneven") / "onnx", cache=True)


def written(folder, ids, mask, count):
    """Greedy decoding with ONNX Runtime and NumPy alone."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    taken = {each.name: each.shape for each in session.get_inputs()}
    names = [each.name for each in session.get_outputs()]
    past = {
        name: np.zeros((len(ids), shape[1], 0, shape[3]), np.float32) for name, shape in taken.items() if "." in name
    }
    new, lengths = ids, []
    for _ in range(count):
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -new.shape[1] :]
        given = {"input_ids": new, "attention_mask": mask, "position_ids": positions}
        out = dict(zip(names, session.run(None, {n: v for n, v in given.items() if n in taken} | past), strict=True))
        past = {name: out[name.replace("past_key_values", "present")] for name in past}
        lengths.append({value.shape[2] for value in past.values()})
        new = out["logits"][:, -1].argmax(-1)[:, None]
        ids, mask = np.concatenate([ids, new], 1), np.concatenate([mask, np.ones_like(new)], 1)
    assert lengths == [{mask.shape[1] - count + step} for step in range(count)], "the cache grows by what was read"
    return ids


def as_generated(model, folder, vocabulary, count=12):
    torch.manual_seed(1)
    ids = torch.randint(3, vocabulary, (6, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # on the left, as tokenizers of decoders pad
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    assert len(set(expected[:, 9:].flatten().tolist())) > 2, "a text of one word shows little"
    return torch.from_numpy(written(folder, ids.numpy(), mask.numpy(), count)), expected


def test_unequal_layers_write_what_pytorch_writes(uneven):
    model, made = uneven
    assert made.cache and made.difference < 1e-4 and made.same_prediction == 1
    ours, expected = as_generated(model, made.folder, 280)
    assert torch.equal(ours, expected)
    assert json.loads((made.folder / "generation_config.json").read_text())["eos_token_id"] == 1
    assert json.loads((made.folder / "config.json").read_text())["use_cache"] is True


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["portable", "gpt2", "qwen3", "mistral", "gemma3_text"])
def test_others_write_what_pytorch_writes(name, tmp_path):
    """Mistral and Gemma 3 past their windows of 5."""
    if name == "portable":
        model = pruned("uniform")
        assert type(model) is LlamaForCausalLM
    else:
        windows = {"sliding_window": 5} if name in ("mistral", "gemma3_text") else {}
        model = make_model(name, tie_word_embeddings=False, **windows).eval()
    made = export(model, "onnx", tmp_path / "onnx", cache=True)
    ours, expected = as_generated(model, made.folder, model.config.vocab_size)
    assert torch.equal(ours, expected)


def test_names_and_sizes_are_those_that_others_read(uneven):
    """Optimum's names in Optimum's order; every layer has its own number of heads."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(uneven[1].folder / "model.onnx"), providers=["CPUExecutionProvider"])
    taken, given = ({each.name: each.shape for each in many} for many in (session.get_inputs(), session.get_outputs()))
    kept = [f"{layer}.{what}" for layer in (0, 1) for what in ("key", "value")]
    assert list(taken) == [
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{name}" for name in kept),
    ]
    assert list(given) == ["logits", *(f"present.{name}" for name in kept)]
    assert [taken[f"past_key_values.{layer}.key"][1::2] for layer in (0, 1)] == [[2, 16], [1, 16]]


def test_called_as_its_model_it_reads_on_and_heeds_its_past(uneven):
    model, made = uneven
    runtime = Runtime(model, "onnx", made.folder, exact=True)
    ids = torch.randint(3, 280, (2, 11))
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        assert_close(runtime(input_ids=ids, use_cache=True).logits, expected, 1e-4)
        first = runtime(input_ids=ids[:, :6])
        rest = runtime(input_ids=ids[:, 6:], past_key_values=first.past_key_values)
        assert_close(rest.logits, expected[:, 6:], 1e-4)
        alone = runtime(input_ids=ids[:, 6:])
        assert (alone.logits - expected[:, 6:]).abs().max() > 0.1
        timed = time_decoding({"onnx": runtime, "torch": model}, {"onnx": ids, "torch": ids}, 3, 1)
    assert timed["onnx"].cache_bytes == timed["torch"].cache_bytes == 2 * (11 + 3) * (32 + 16) * 2 * 4


def test_a_report_says_how_it_writes(uneven):
    model, made = uneven
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 280, (3, 11))]
    reader = Reader(model, rows, lambda some: {name: torch.stack([row[name] for row in some]) for name in rows[0]})
    work, facts = Work("causal-lm", 1, 11, 2), {"format": "onnx", "quantize": None, "difference": 0.0}
    record = measure_export(facts | {"cache": True}, made.folder, reader, reader, work, new_tokens=4)
    assert record.cache and record.writing.token_ms > 0 and record.writing_speedup > 0
    assert record.writing.cache_bytes == 2 * (11 + 4) * (32 + 16) * 4
    assert abs(record.quality_difference) < 1e-3
    assert measure_export(facts | {"cache": True}, made.folder, reader, reader, work).writing is None


def test_a_cache_that_is_not_read_is_refused(uneven, tmp_path, monkeypatch):
    model, made = uneven
    monkeypatch.setattr(
        formats.Onnx,
        "write",
        lambda self, model, example, shapes, quantize, folder: shutil.copytree(
            made.folder, folder, dirs_exist_ok=True
        ),
    )
    assert export(model, "onnx", tmp_path / "right", cache=True).difference < 1e-4
    right = module.CachedProgram.__call__
    monkeypatch.setattr(
        module.CachedProgram, "__call__", lambda self, past_key_values=None, **inputs: right(self, **inputs)
    )
    with pytest.raises(UnsupportedModelError, match=r"does not take|computes another output"):
        export(model, "onnx", tmp_path / "wrong", cache=True)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("make", "options", "error", "words"),
    [
        (lambda: make_model("bert"), {}, UnsupportedModelError, "no decoder with a head"),
        (lambda: make_model("t5"), {}, UnsupportedModelError, "no decoder with a head"),
        (
            lambda: convert_attention(make_model("llama"), TINY["local"]),
            {},
            UnsupportedModelError,
            "of the kind local keeps another state",
        ),
        (
            lambda: MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=VOCABULARY)),
            {},
            UnsupportedModelError,
            "not keys and values of every token",
        ),
        (make_llama, {"format": "torch"}, ConfigError, "format 'torch' has no cache here, only onnx"),
        (make_llama, {"format": "gguf"}, ConfigError, r"llama\.cpp has its own"),
    ],
)
def test_what_has_no_such_cache_is_said_before_any_work(make, options, error, words, tmp_path):
    model = make()
    with pytest.raises(error, match=words):
        export(model, options.get("format", "onnx"), tmp_path / "out", cache=True)
    assert not (tmp_path / "out").exists()


def test_a_stage_with_a_cache_stands_beside_one_without():
    plain, cached = ExportStage(), ExportStage(cache=True, quantize="int8")
    assert "cache" not in plain.to_dict() and cached.to_dict()["cache"] is True
    assert (plain.beside, cached.beside) == ("onnx", "onnx-cache-int8")
    assert ExportStage(max_loss=0.0).to_dict()["max_loss"] == 0.0
    with pytest.raises(ConfigError, match="has no cache here"):
        ExportStage(format="openvino", cache=True)
