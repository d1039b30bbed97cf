"""llama.cpp computes and writes what transformers does: `pip install cyllama` brings it as a wheel."""

import os

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from hf_efficient import PruningConfig, export, prune, prune_vocabulary
from hf_efficient.data.bundled import bundled_model
from hf_efficient.errors import CheckpointError, ConfigError
from hf_efficient.models.loading import load_model, load_processor
from hf_efficient.runtimes.gguf import write_gguf
from hf_efficient.runtimes.llamacpp import LlamaCpp, greedy, installed

from ..gguf_files import WORDS, make_llama
from .test_gguf import ROPE, chat_tokenizer, uneven

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(installed() is None, reason="no llama.cpp: pip install cyllama (or llama-cpp-python)"),
]
KINDS = ("float32", "float16", "bfloat16")
CHAT = [{"role": "user", "content": "Why are 3 of 12 whales\n  blue? Übrigens: 'naïve' 🐋 isn't 1,024."}]


def in_transformers(model, ids, count):
    mask = torch.ones(1, len(ids), dtype=torch.long)
    written = model.generate(torch.tensor([ids]), attention_mask=mask, max_new_tokens=count, do_sample=False)
    return written[0, len(ids) :].tolist()


@pytest.mark.parametrize("kind", ["even", "uneven", "llama3"])
def test_it_computes_and_writes_the_same(kind, tmp_path):
    rope = ROPE | {"original_max_position_embeddings": 16}
    model = uneven() if kind == "uneven" else make_llama(**{"rope_parameters": rope} if kind == "llama3" else {})
    tokenizer = chat_tokenizer()
    made = export(model, "gguf", tmp_path / "out", tokenizer=tokenizer)
    assert made.difference < 1e-5
    assert made.runtime.split()[0] in ("cyllama", "llama_cpp_python")
    program = LlamaCpp(made.folder / "model.gguf", 1, exact=True)
    ids = tokenizer(WORDS)["input_ids"]
    assert program.started(len(ids)).tokenize(WORDS) == ids
    assert greedy(program, ids, 12) == in_transformers(model, ids, 12)
    turned = ids[::-1]
    assert greedy(program, turned, 12) != greedy(program, ids, 12), "the text must be heeded"


@pytest.fixture(scope="module")
def pruned():
    """SmolLM2 with fewer tokens and smaller layers: a stock Llama; without its package a small one as wide."""
    try:
        folder = os.environ.get("SMOLLM2") or bundled_model("smollm2-135m")
    except (CheckpointError, ConfigError) as error:
        pytest.skip(f"no SmolLM2: {error}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_model("AutoModelForCausalLM", folder, dtype=torch.float32)
    model, tokenizer = prune_vocabulary(model, tokenizer, [CHAT[0]["content"]], keep=set(range(30_000)))
    # Few units: what magnitudes ruin makes much of any rounding.
    config = PruningConfig(0.03, importance="magnitude", granularity="neuron", allocation="uniform", reconstruct=False)
    small = prune(model, config).eval()
    assert type(small) is LlamaForCausalLM and small.config.vocab_size < 49_152
    return small, tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_chat_model_writes_the_same_text(kind, pruned, tmp_path):
    """Its own tokenizer, chat template and fewer tokens."""
    small, tokenizer = pruned
    path = tmp_path / "small.gguf"
    twin = load_model("AutoModelForCausalLM", saved(small, tmp_path)).to(getattr(torch, kind))
    write_gguf(twin, tokenizer, path)
    twin = twin.float().eval()  # llama.cpp adds up in float32, whatever the weights are
    asked = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    program = LlamaCpp(path, 1, exact=True)
    engine = program.started(len(ids))
    assert engine.tokenize(asked) == ids
    with torch.inference_mode():
        ours = twin(torch.tensor([ids])).logits[0]
    theirs = engine.read(ids, every=True)
    # Activations are rounded to the type of the weights before each product.
    far = ((ours - theirs).abs().max() / ours.abs().max()).item()
    assert far < {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.1}[kind]
    if kind in ("float32", "float16"):
        assert greedy(program, ids, 24) == in_transformers(twin, ids, 24)
    else:
        assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.85
    assert load_processor(path).chat_template == tokenizer.chat_template


def test_eight_bits_mostly_say_the_same(pruned, tmp_path):
    """llama.cpp rounds what is multiplied with such weights to 8 bits as well: no bound on single numbers."""
    small, tokenizer = pruned
    made = export(small, "gguf", tmp_path / "out", tokenizer=tokenizer, quantize="int8")
    asked = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    theirs = LlamaCpp(made.folder / "model.gguf", 1, exact=True).started(len(ids)).read(ids, every=True)
    with torch.inference_mode():
        ours = small(torch.tensor([ids])).logits[0]
    apart = torch.nn.functional.kl_div(theirs.log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction="none")
    alike = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    assert made.bytes_on_disk < 0.35 * 4 * small.num_parameters()
    assert apart.sum(-1).mean() < 0.1 and alike > 0.8, (apart.sum(-1).mean(), alike)


def saved(model, folder):
    model.save_pretrained(folder / "hf")
    return folder / "hf"
