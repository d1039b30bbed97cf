"""Models that write out their attention, without the interface of transformers, converted like any other."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_efficient import AttentionConfig, PruningConfig, UnsupportedModelError, convert_attention, export, prune
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.derive.compare import distance, outputs_of
from hf_efficient.models.derive.inputs import tiny_inputs
from hf_efficient.models.derive.tiny import tiny_config, tiny_model
from hf_efficient.models.family import CONVERT, Family
from hf_efficient.models.registry import remember

from ...helpers import selected
from .tiny import make, outputs
from .toy import ToyConfig, ToyModel, register

RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
# With what changes of the config, and whether it has a bias for all pairs of tokens.
TYPES = {
    "megatron-bert": ({}, False),
    "gpt_neo": ({}, False),  # its windows and the order of its tokens are filled in
    "xglm": ({}, False),  # three dimensions
    "mpnet": ({}, True),
    "deberta-v2": (RELATIVE, True),  # products of queries and positions beside that of queries and keys
    "bloom": ({}, True),  # added to the product in one function
    "gptj": ({}, False),
    "layoutlmv3": ({}, True),
    "openai-gpt": ({}, False),
    "cpmant": ({}, True),
    "data2vec-vision": ({}, False),
    "trocr": ({}, False),  # cross attention beside it
}
FAST = ("xglm", "mpnet")
SINGLE = ("gpt_neo", "gptj", "bloom")  # scores or weights in single precision, whatever the model's is
WIDE, NARROW = (AttentionConfig("local", window=window, global_tokens=0) for window in (4096, 2))


def real(tensor, inputs):
    mask = inputs.get("attention_mask")
    return tensor if mask is None or mask.shape != tensor.shape[:2] else tensor[mask.bool()]


@pytest.mark.parametrize(("name",), selected([(name,) for name in TYPES], lambda name: name in FAST))
def test_with_all_in_view_it_is_the_same_and_with_a_window_it_is_not(name):
    changes, is_biased = TYPES[name]
    model, inputs = make(name, **changes)
    [stack] = Anatomy.of(model).stacks
    assert stack.entry.why_not(CONVERT) is None
    assert stack.entry.attention.routed and stack.entry.attention.biased is is_biased
    family = Anatomy.of(model).family
    assert Family.from_dict(json.loads(json.dumps(family.to_dict()))) == family
    if name != "xglm":  # whose mask of double precision does not fit
        model = model.double()
        inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    wide, narrow = convert_attention(model, WIDE), convert_attention(model, NARROW)
    expected = outputs(model, inputs)
    limit = 1e-5 if name in ("xglm", *SINGLE) else 1e-10
    assert real(outputs(wide, inputs) - expected, inputs).abs().max() < limit
    assert real(outputs(narrow, inputs) - expected, inputs).abs().max() > 1e-2
    again = copy.deepcopy(narrow)
    assert torch.equal(outputs(again, inputs), outputs(narrow, inputs))
    back = convert_attention(narrow, AttentionConfig("full"))
    assert type(back) is type(model) and torch.equal(outputs(back, inputs), expected)


def test_it_trains_with_the_gradients_of_the_stock_model():
    model, inputs = make("mpnet", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = model.double()
    gradients = []
    for one in (model, convert_attention(model, WIDE)):
        one.train()
        real(one(**inputs)[0], inputs).square().sum().backward()
        gradients.append({name: value.grad for name, value in one.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() < 1e-9, name


def generated(model, ids, **options):
    return model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)


@pytest.mark.parametrize(
    ("name",), selected([(name,) for name in ("gpt_neo", "xglm", "gptj", "bloom")], lambda name: name == "gptj")
)
def test_it_decodes_from_a_cache_what_it_gives_without_one(name):
    head = {"gpt_neo": "GPTNeo", "xglm": "XGLM", "gptj": "GPTJ", "bloom": "Bloom"}[name]
    model = tiny_model(tiny_config(CONFIG_MAPPING[name]()), getattr(transformers, f"{head}ForCausalLM")).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(5, 60, (2, 7))
    stock = generated(model, ids)
    assert torch.equal(generated(convert_attention(model, WIDE), ids), stock)
    without_pairs = [] if name in ("gpt_neo", "bloom") else [AttentionConfig("strided")]  # windows, ALiBi
    for config in (NARROW, *without_pairs):
        converted = convert_attention(model, config)
        assert torch.equal(generated(converted, ids), generated(converted, ids, use_cache=False))
    padded = torch.cat([torch.full((2, 2), 1), ids], 1)
    mask = (torch.arange(9)[None] > 1).long().expand(2, -1)
    from_padded = generated(convert_attention(model, NARROW), padded, attention_mask=mask)
    if name != "bloom":  # whose ALiBi counts from the padding
        assert torch.equal(from_padded[:, 9:], generated(convert_attention(model, NARROW), ids)[:, 7:])


def test_weights_are_given_where_they_are_asked_for():
    model, inputs = make("megatron-bert")
    wanted = model(**inputs, output_attentions=True).attentions
    given = convert_attention(model, WIDE)(**inputs, output_attentions=True).attentions
    for left, right in zip(given, wanted, strict=True):
        assert (left - right)[1].abs().max() < 1e-5
    narrow = convert_attention(model, NARROW)(**inputs, output_attentions=True).attentions[0]
    assert (narrow[1] == 0).sum() > (wanted[0][1] == 0).sum()


def test_pruned_before_or_after(tmp_path):
    model, inputs = make("mpnet")
    by_size = PruningConfig(ratio=0.2, importance="magnitude", round_to=1, reconstruct=False, granularity=("head",))
    small = prune(convert_attention(model, WIDE), by_size)
    other = convert_attention(prune(model, by_size), WIDE)
    assert small.num_parameters() < model.num_parameters()
    assert distance(outputs_of(small, inputs), outputs_of(other, inputs), inputs) < 1e-5
    assert distance(outputs_of(small, inputs), outputs_of(prune(model, by_size), inputs), inputs) < 1e-5
    small.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path), inputs), outputs(small, inputs))


def test_kinds_that_have_no_place_for_a_bias_are_refused_and_others_take_the_mask():
    with pytest.raises(UnsupportedModelError, match="'linear' attention has no place for the bias that mpnet models"):
        convert_attention(make("mpnet")[0], AttentionConfig("linear"))
    for name in ("megatron-bert", "gptj"):
        model, inputs = make(name)
        linear = convert_attention(model, AttentionConfig("linear"))
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        short = outputs(linear, {"input_ids": ids[:, :6]})
        padded = outputs(linear, {"input_ids": ids, "attention_mask": (torch.arange(9) < 6).long().expand_as(mask)})
        assert (padded[:, :6] - short).abs().max() < 1e-5


def test_a_stack_that_calls_the_interface_beside_one_that_does_not():
    """The images of GIT reach its text, whose attention is its own; each keeps the masks that it reads."""
    model, inputs = make("git")
    assert {stack.name: stack.entry.attention.routed for stack in Anatomy.of(model).stacks} == {
        "vision": False,
        "encoder": True,
    }
    for stack in ("vision", "encoder"):
        wide = convert_attention(model, {stack: WIDE})
        assert distance(outputs_of(wide, inputs), outputs_of(model, inputs), inputs) < 1e-5
        narrow = convert_attention(model, {stack: NARROW})
        assert distance(outputs_of(narrow, inputs), outputs_of(model, inputs), inputs) > 1e-3


# Their heads cannot be told apart by disturbing linears: sums over other dimensions, tokens before rows, rows and
# columns of an image, one function of torch.
WATCHED = ("xlnet", "fsmt", "vitdet", "wavlm")


@pytest.mark.parametrize(("name",), selected([(name,) for name in WATCHED], lambda name: name in ("xlnet", "vitdet")))
def test_attention_is_found_where_weights_meet_values(name):
    model, inputs = make(name)
    for stack in Anatomy.of(model).stacks:
        assert stack.entry.attention.routed and not stack.entry.why_not(CONVERT)
        assert stack.entry.why_not("heads") and not stack.entry.attention.query
        assert stack.num_heads == 4
    wide, narrow = convert_attention(model, WIDE), convert_attention(model, NARROW)
    assert distance(outputs_of(wide, inputs), outputs_of(model, inputs), inputs) < 1e-5
    assert distance(outputs_of(narrow, inputs), outputs_of(model, inputs), inputs) > 1e-3


def test_dropout_of_a_sort_of_its_own_is_noticed():
    """SEW-D's is a function that changes weights in a way that is not known, in training alone."""
    [stack] = Anatomy.of(make("sew-d")[0]).stacks
    assert "DisentangledSelfAttention computed its attention itself" in stack.entry.why_not(CONVERT)


def test_an_entry_that_is_not_true_is_noticed():
    """The wrong module, and one that is not watched: nothing would be converted."""
    model, _ = make("megatron-bert")
    family = Anatomy.of(model).family
    [stack] = family.stacks
    for attention in (replace(stack.attention, routed=False), replace(stack.attention, module="attention.output")):
        remember(model.config, replace(family, stacks=(replace(stack, attention=attention),)))
        try:
            with pytest.raises(
                (UnsupportedModelError, RuntimeError), match=r"computed its attention itself|size of tensor"
            ):
                convert_attention(model, NARROW)
        finally:
            remember(model.config, family)


def test_an_architecture_of_ones_own_needs_no_interface(tmp_path):
    register()
    model = ToyModel(ToyConfig()).eval()
    inputs = {"input_ids": torch.randint(3, 90, (2, 9))}
    narrow = convert_attention(model, NARROW)
    assert (outputs(convert_attention(model, WIDE), inputs) - outputs(model, inputs)).abs().max() < 1e-5
    assert (outputs(narrow, inputs) - outputs(model, inputs)).abs().max() > 1e-3
    narrow.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path), inputs), outputs(narrow, inputs))


@pytest.mark.thorough
def test_compiled_and_exported(tmp_path):
    model, inputs = make("megatron-bert")
    narrow = convert_attention(model, NARROW)
    with torch.no_grad():
        assert (torch.compile(narrow)(**inputs)[0] - narrow(**inputs)[0]).abs().max() < 1e-5
    for name in ("megatron-bert", "gptj"):
        narrow = convert_attention(make(name)[0], NARROW)
        assert export(narrow, "onnx", tmp_path / name, inputs=[tiny_inputs(narrow)]).difference < 1e-4
