"""Token merging: equal to a twin that keeps all tokens, exact where tokens are alike, saved, trained, exported."""

import threading

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DeiTConfig,
    DeiTModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    OPTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_efficient import AttentionConfig, convert_attention, efficient_config
from hf_efficient.attention.config import decreasing_tokens
from hf_efficient.attention.kinds.merging import match, merge
from hf_efficient.errors import ConfigError, UnsupportedModelError
from hf_efficient.runtimes.export import export
from hf_efficient.stages.attention import AttentionStage

from ..helpers import assert_close

LAYERS, HEADS, SIDE, PATCHES = 3, 4, 32, 64
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "image_size": SIDE,
    "patch_size": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
MERGED = (9, 0, 20)


def make_model(**changes) -> ViTForImageClassification:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SIZES | changes, num_labels=5)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def merging(tokens=MERGED) -> AttentionConfig:
    return AttentionConfig("merging", merged_tokens=tokens)


def naive(model: ViTForImageClassification, pixels: Tensor, merged: tuple[int, ...]) -> Tensor:
    """The logits of one image, all tokens kept: those that were merged hold one state, the mean over all of them.

    Ordinary attention over all of them is then what proportional attention over the merged ones is.
    """
    x = model.vit.embeddings(pixels[None])[0]  # [T, C]
    alive, owner = list(range(len(x))), list(range(len(x)))
    for layer, count in zip(model.vit.layers, merged, strict=True):
        attention, normed = layer.attention, layer.layernorm_before(x)
        q, k, v = (
            linear(normed).view(len(x), HEADS, -1) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        weights = torch.einsum("ihd,jhd->hij", q, k).mul(attention.scaling).softmax(-1)
        y = x + attention.o_proj(torch.einsum("hij,jhd->ihd", weights, v).flatten(1))
        keys = F.normalize(k.mean(1), dim=-1)
        a, b = alive[1::2], alive[2::2]  # the first is the class token
        best = {one: max(b, key=lambda other: (keys[one] @ keys[other]).item()) for one in a}
        closest = sorted(a, key=lambda one: -(keys[one] @ keys[best[one]]).item())[:count]
        owner = [best[one] if one in closest else one for one in owner]
        alive = [one for one in alive if one not in closest]
        y = torch.stack([y[[i for i, other in enumerate(owner) if other == one]].mean(0) for one in owner])
        x = y + layer.mlp(layer.layernorm_after(y))
    return model.classifier(model.vit.layernorm(x)[0])


def test_logits_and_gradients_are_those_of_a_naive_twin():
    model = make_model().double()
    merged = convert_attention(model, merging())
    pixels = images().double()
    expected = torch.stack([naive(model, image, MERGED) for image in pixels])
    outputs = merged(pixels).logits
    assert_close(outputs, expected, 1e-10)
    assert (outputs - model(pixels).logits).abs().max() > 1e-3
    target = torch.randn_like(outputs)
    (outputs * target).sum().backward()
    (expected * target).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in merged.named_parameters():
        if name.endswith("k_proj.bias"):  # softmax does not see it
            continue
        assert_close(parameter.grad, gradients[name], 1e-9 * max(1, gradients[name].abs().max().item()), name)


def test_nothing_merged_is_the_original_to_the_bit():
    model = make_model()
    same = convert_attention(model, merging(0))
    assert torch.equal(same(images()).logits, model(images()).logits)
    back = convert_attention(convert_attention(model, merging()), AttentionConfig("full"))
    assert type(back) is ViTForImageClassification
    assert torch.equal(back(images()).logits, model(images()).logits)


def lengths(model, pixels: Tensor) -> list[int]:
    """How many tokens each FFN is given."""
    seen = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
        for layer in model.vit.layers
    ]
    model(pixels)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(
    ("tokens", "counts"),
    [(8, [57, 49, 41]), ((9, 0, 20), [56, 56, 36]), (1000, [33, 17, 9]), (0, [65, 65, 65])],
)
def test_each_ffn_gets_fewer_tokens_and_the_output_has_all(tokens, counts):
    model = convert_attention(make_model(), merging(tokens))
    assert lengths(model, images()) == counts
    assert model.vit(images()).last_hidden_state.shape[1] == PATCHES + 1


def test_a_layer_that_is_full_counts_with_the_sizes():
    model = make_model()
    one, all_named = (convert_attention(model, tokens) for tokens in ({0: merging(30)}, merging((30, 0, 0))))
    assert torch.equal(one(images()).logits, all_named(images()).logits)
    unweighted = one.vit.layers[1].attention.efficient_attention
    unweighted.attend = lambda query, key, value, mask, **rest: F.scaled_dot_product_attention(query, key, value)
    assert not torch.allclose(one(images()).logits, all_named(images()).logits)


def test_tokens_that_are_alike_are_merged_without_loss():
    model = make_model()
    with torch.no_grad():
        model.vit.embeddings.position_embeddings[:, 1:] = 0
    pixels = images().view(2, 3, 8, 4, 8, 4)
    pixels[:, :, :, :, 1::2] = pixels[:, :, :, :, ::2]  # each patch twice, side by side
    pixels = pixels.view(2, 3, SIDE, SIDE)
    merged = convert_attention(model, merging((PATCHES // 2, 0, 0)))
    assert lengths(merged, pixels) == [33, 33, 33]
    assert_close(merged(pixels).logits, model(pixels).logits, 1e-5)


def test_matching_joins_the_nearest_and_keeps_the_first():
    keys = torch.eye(6)[None, None]
    keys[..., 4, :] = keys[..., 1, :] + 0.1  # tokens 1 and 4 are alike, one an a and one a b
    keys[..., 0, :] = keys[..., 1, :]  # as is the first, which is protected
    assert match(keys, 1, 1).tolist() == [[0, 3, 1, 2, 3, 4]]
    x = torch.arange(6.0).view(1, 6, 1)
    sizes = torch.tensor([[1, 3, 1, 1, 1, 1]])
    assert merge(x, match(keys, 1, 1), 5, sizes).flatten().tolist() == [0, 2, 3, (3 * 1 + 4) / 4, 5]


def test_the_decreasing_schedule_and_lists():
    assert decreasing_tokens(8, 5) == [16, 12, 8, 4, 0]
    assert decreasing_tokens(8, 1) == [8]
    model = convert_attention(make_model(), merging(decreasing_tokens(8, LAYERS)))
    assert lengths(model, images()) == [49, 41, 41]
    with pytest.raises(ConfigError, match="2 numbers for 3 layers"):
        convert_attention(make_model(), merging((8, 8)))
    assert lengths(convert_attention(make_model(), merging((8, 4)), layers=[0, 2]), images()) == [57, 57, 53]
    for wrong in (-1, True, 2.0, [], [1, -1], "8"):
        with pytest.raises(ConfigError, match="merged_tokens"):
            AttentionConfig("merging", merged_tokens=wrong)


def test_it_is_saved_and_loaded(tmp_path):
    model = convert_attention(make_model(), merging())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(images()).logits, model(images()).logits)
    attention = loaded.config.efficient["stacks"]["encoder"]["attention"]
    assert attention[2] == {"kind": "merging", "merged_tokens": 20, "protected_tokens": 1}
    config = efficient_config(make_model().config, merging())
    assert config.efficient["stacks"] == loaded.config.efficient["stacks"]


def test_a_config_of_a_stranger_is_refused():
    block = efficient_config(make_model().config, merging()).to_dict()
    entry = block["efficient"]["stacks"]["encoder"]["attention"]
    for layer in (
        {"kind": "merging", "merged_tokens": [1, 2], "protected_tokens": 1},
        {"kind": "merging", "merged_tokens": 1},
        {"kind": "merging", "merged_tokens": 1, "protected_tokens": 2},
        {"kind": "local"},
    ):
        entry[1] = layer
        config = type(efficient_config(make_model().config, merging())).from_dict(block)
        with pytest.raises(ConfigError, match="merge tokens"):
            AutoModelForImageClassification.from_config(config)


def test_in_a_recipe():
    section = {"kind": "merging", "merged_tokens": [9, 0, 20]}
    stage = AttentionStage.read(section, "stages[0].attention")
    assert stage.config == merging()
    assert stage.to_dict() == section
    section = {"layers": {"all": {"kind": "merging", "merged_tokens": [9, 0, 20]}}}
    assert AttentionStage.read(section, "stages[0].attention").to_dict() == section


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_training(checkpointing):
    model = convert_attention(make_model(), merging()).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(images(), labels=torch.tensor([1, 3])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]


def test_checkpointing_gives_the_same_gradients():
    model = convert_attention(make_model(), merging()).train()
    gradients = []
    for use_checkpoints in (False, True):
        if use_checkpoints:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        (model(images()).logits.sum() + model(images().flip(0) * 2).logits.square().sum()).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


def test_states_that_were_replaced_are_an_error():
    model = convert_attention(make_model(), merging())
    handle = model.vit.layers[0].register_forward_hook(lambda module, args, output: output.clone())
    with pytest.raises(UnsupportedModelError, match="replaced between two layers"):
        model(images())
    handle.remove()
    with pytest.raises(UnsupportedModelError, match="outside of a layer"):
        model.vit.layers[0].attention(torch.randn(1, 5, 32))


def test_threads_do_not_meet():
    model = convert_attention(make_model(), merging())
    given = [images() * scale for scale in range(1, 5)]
    expected, found = [model(one).logits for one in given], [None] * 4

    def work(number: int) -> None:
        for _ in range(5):
            found[number] = model(given[number]).logits

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("model_class", "config", "protected"),
    [
        (DeiTModel, DeiTConfig(**SIZES), 2),
        (SiglipVisionModel, SiglipVisionConfig(**SIZES), 0),
    ],
)
def test_which_tokens_are_of_no_patch_is_found_out(model_class, config, protected):
    model = convert_attention(model_class(config).eval(), merging())
    [stack] = model.config.efficient["stacks"].values()
    assert {layer["protected_tokens"] for layer in stack["attention"]} == {protected}
    model(images())


def test_one_tower_of_two():
    parts = {name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = CLIPConfig(
        text_config=parts | {"intermediate_size": 48, "vocab_size": 50, "eos_token_id": 1},
        vision_config=parts | {"intermediate_size": 48, "image_size": SIDE, "patch_size": 4},
        projection_dim=16,
    )
    model = CLIPModel(config).eval()
    with pytest.raises(UnsupportedModelError, match="decoder"):
        convert_attention(model, merging())
    merged = convert_attention(model, {"vision": merging()})
    text = torch.tensor([[5, 6, 7, 1]])
    before, after = (one(input_ids=text, pixel_values=images()) for one in (model, merged))
    assert torch.equal(before.text_embeds, after.text_embeds)
    assert not torch.equal(before.image_embeds, after.image_embeds)


def test_what_cannot_merge_is_refused_with_the_reason():
    text = {name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    with pytest.raises(UnsupportedModelError, match="reads no image or sound"):
        convert_attention(BertModel(BertConfig(**text, vocab_size=50, intermediate_size=48)), merging())
    with pytest.raises(UnsupportedModelError, match="decoder"):
        convert_attention(OPTModel(OPTConfig(**text, vocab_size=50, ffn_dim=48, word_embed_proj_dim=32)), merging())


def test_a_model_that_reads_states_between_the_layers_is_refused():
    """LLaVA reads the image before the last layer, where tokens are merged still."""
    parts = {name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = LlavaConfig(
        vision_config=parts | {"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": 4},
        text_config=parts | {"model_type": "llama", "vocab_size": 60, "intermediate_size": 48},
        image_token_index=59,
    )
    model = LlavaForConditionalGeneration(config)
    with pytest.raises(UnsupportedModelError, match="do not match"):
        convert_attention(model, {"vision": merging()})


@pytest.mark.parametrize("format", ["torch", pytest.param("onnx", marks=pytest.mark.thorough)])
def test_the_export_computes_the_same(format, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    model = convert_attention(make_model(), merging())
    exported = export(model, format, tmp_path / format, inputs=[{"pixel_values": images(3)}])
    assert exported.difference < 1e-4
    assert exported.same_prediction == 1


def test_weights_and_states_are_those_of_fewer_tokens():
    model = convert_attention(make_model(), merging())
    output = model(images(), output_hidden_states=True, output_attentions=True)
    assert [states.shape[1] for states in output.hidden_states] == [65, 56, 56, 65]
    assert [weights.shape[-1] for weights in output.attentions] == [65, 56, 56]
    assert_close(output.attentions[2].sum(-1), torch.ones(2, HEADS, 56), 1e-5)
