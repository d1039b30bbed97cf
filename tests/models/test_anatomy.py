"""One object says what a model is made of, the same as the model itself."""

import pytest
from transformers import ResNetConfig, ResNetModel, T5EncoderModel

from hf_efficient import AttentionConfig, convert_attention
from hf_efficient.errors import ConfigError, UnsupportedModelError
from hf_efficient.models.anatomy import Anatomy, ConfigAnatomy
from hf_efficient.models.families import FAMILIES

from ..families import make_model


@pytest.mark.parametrize("model_type", FAMILIES)
def test_stacks_are_those_of_the_model(model_type):
    model = make_model(model_type)
    anatomy, bare = Anatomy.of(model), ConfigAnatomy.of_config(model.config)
    assert [stack.name for stack in anatomy.stacks] == [stack.name for stack in bare.stacks]
    for stack, other in zip(anatomy.stacks, bare.stacks, strict=True):
        assert model.get_submodule(stack.prefix) is stack.layers
        assert stack.depth == len(stack.layers) == other.depth
        assert stack.width == other.width == getattr(stack.entry.own_config(model.config), stack.entry.hidden)
        assert stack.num_heads == stack.group_size * stack.num_kv_heads
        for index, layer in enumerate(stack.layers):
            assert model.get_submodule(stack.layer_prefix(index)) is layer
            for path in (*stack.up, stack.down, *(attention.output for attention in stack.attentions.values())):
                layer.get_submodule(path)
    for group in anatomy.groups:
        stack = anatomy.stack(group.stack)
        assert {member.prefix for member in group.members} == {stack.layer_prefix(index) for index in group.layers}
        assert group.units == (stack.num_neurons if group.kind == "neurons" else stack.num_kv_heads)


def test_a_class_without_a_stack_has_none():
    model = T5EncoderModel(make_model("t5").config)
    assert [stack.name for stack in Anatomy.of(model).stacks] == ["encoder"]
    assert [stack.name for stack in ConfigAnatomy.of_config(model.config).stacks] == ["encoder", "decoder"]
    with pytest.raises(ConfigError, match="decoder"):
        Anatomy.of(model).stack("decoder")


def test_block_and_groups_are_read_once():
    model = convert_attention(make_model("bert"), AttentionConfig("local", window=4))
    anatomy = Anatomy.of(model)
    assert anatomy.block is anatomy.block and anatomy.groups is anatomy.groups
    assert anatomy.block.is_converted() and not Anatomy.of(make_model("bert")).block.is_converted()


def test_a_model_without_attention_has_no_anatomy():
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    for make_anatomy in (lambda: Anatomy.of(model), lambda: ConfigAnatomy.of_config(model.config)):
        with pytest.raises(UnsupportedModelError, match="'resnet' are built could not be found out"):
            make_anatomy()
