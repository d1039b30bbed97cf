"""The shallow student has the first layers of its teacher, and at least the MACs of the result."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_efficient import PruningConfig, build_student, prune
from hf_efficient.baselines.shallow import layers_for
from hf_efficient.measurement.size import count_macs
from hf_efficient.models.inputs import dummy_inputs

FIELDS = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 64}


def bert(layers=6):
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **FIELDS)).eval()


def macs(model):
    return count_macs(model, dummy_inputs(model, 1, 32))


@pytest.mark.parametrize("kept", [1, 2, 5, 6])
def test_so_many_layers_are_found_again(kept):
    teacher = bert()
    assert layers_for(teacher, build_student(teacher, layers=kept), 32) == (kept, 6)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.75])
def test_it_is_no_cheaper_than_the_result_and_a_layer_less_would_be(ratio):
    teacher = bert()
    small = prune(teacher, PruningConfig(ratio, importance="magnitude", reconstruct=False, sequence_length=32))
    kept, depth = layers_for(teacher, small, 32)
    first = build_student(teacher, layers=list(range(kept)))
    assert depth == 6 and macs(first) >= 0.99 * macs(small)
    assert kept == 1 or macs(build_student(teacher, layers=list(range(kept - 1)))) < macs(small)
    names = [name for name, _ in first.bert.encoder.layer[-1].named_parameters()]
    last = teacher.bert.encoder.layer[kept - 1]
    assert all(
        torch.equal(first.bert.encoder.layer[-1].get_parameter(name), last.get_parameter(name)) for name in names
    )


def test_one_layer_is_the_least():
    assert layers_for(bert(1), bert(1), 32) == (1, 1)
