import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from hf_efficient.errors import CheckpointError
from hf_efficient.measurement.size import (
    bytes_on_disk,
    count_macs,
    count_parameters,
    count_weight_bytes,
    measure_size,
    peak_memory_bytes,
)
from hf_efficient.models.inputs import dummy_inputs

from .models import INNER, POSITIONS, TYPES, VOCABULARY, WIDTH, bert_classifier, bert_layer, gpt2, vit

LAYER = 4 * (WIDTH * WIDTH + WIDTH) + (WIDTH * INNER + INNER) + (INNER * WIDTH + WIDTH) + 2 * 2 * WIDTH


def test_parameters_of_a_bert_layer_by_hand():
    model = bert_layer()
    tables = (VOCABULARY + POSITIONS + TYPES) * WIDTH
    norm = 2 * WIDTH
    assert count_parameters(model)[:2] == (tables + norm + LAYER, tables)


def test_a_tied_head_is_counted_once_and_an_untied_one_as_computation():
    tied, untied = count_parameters(gpt2()), count_parameters(gpt2(tie_word_embeddings=False))
    assert untied[0] - tied[0] == VOCABULARY * WIDTH
    assert untied[1] == tied[1] == (VOCABULARY + POSITIONS) * WIDTH


def test_vit_patch_projection_is_not_a_lookup_table():
    assert count_parameters(vit())[1] == 0


def test_zeros_are_not_counted_as_nonzero():
    model = torch.nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
        assert count_parameters(model) == (64, 0, 64)
        model.weight[:3] = 0
    assert count_parameters(model) == (64, 0, 40)


def test_weight_bytes_are_what_a_checkpoint_holds(tmp_path):
    model = bert_classifier()
    model.save_pretrained(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"x" * 10_000)
    header = bytes_on_disk(tmp_path) - count_weight_bytes(model)
    assert 0 < header < 8_000
    assert count_weight_bytes(model.half()) * 2 == bytes_on_disk(tmp_path) - header


def test_a_folder_without_weights_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="No weights"):
        bytes_on_disk(tmp_path)


@pytest.mark.parametrize(("batch", "length"), [(1, 16), (3, 33)])
def test_macs_of_a_bert_layer_by_hand(batch, length):
    model = bert_layer()
    projections = 4 * length * WIDTH * WIDTH
    attention = 2 * length * length * WIDTH
    feed_forward = 2 * length * WIDTH * INNER
    assert count_macs(model, dummy_inputs(model, batch, length)) == batch * (projections + attention + feed_forward)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_is_counted_whoever_computes_it(implementation):
    model = bert_layer()
    model.set_attn_implementation(implementation)
    with_long = count_macs(model, dummy_inputs(model, 1, 32)) - 2 * count_macs(model, dummy_inputs(model, 1, 16))
    assert with_long == 2 * WIDTH * (32 * 32 - 2 * 16 * 16)


class Attention(torch.nn.Module):
    def forward(self, query, key, mask=None):
        return sdpa(query, key, key, attn_mask=mask, enable_gqa=True)


def test_blocked_masked_and_grouped_attention_is_counted():
    attention = Attention()
    blocks, mask = torch.randn(6, 4, 8, 16), torch.ones(6, 1, 8, 24, dtype=torch.bool)  # [B * blocks, H, T, D]
    keys = torch.randn(6, 4, 24, 16)
    by_hand = 2 * 6 * 4 * 8 * 24 * 16
    assert count_macs(attention, {"query": blocks, "key": keys, "mask": mask}) == by_hand
    assert count_macs(attention, {"query": blocks, "key": keys[:, :2], "mask": mask}) == by_hand
    assert count_macs(attention, {"query": blocks.double(), "key": keys.double()}) == by_hand
    five = {"query": blocks.view(2, 3, 4, 8, 16), "key": keys.view(2, 3, 4, 24, 16)}
    assert count_macs(attention, five) == by_hand


def test_macs_on_the_meta_device_are_the_same():
    real, meta = bert_layer(), bert_layer().to("meta")
    assert count_macs(meta, dummy_inputs(meta, 2, 16)) == count_macs(real, dummy_inputs(real, 2, 16)) > 0


def test_peak_memory_by_hand_and_again():
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 32))
    inputs = {"input": torch.randn(10, 64)}
    weights = count_weight_bytes(model)
    # While the second layer runs, the first one's output and its own are alive.
    assert peak_memory_bytes(model, inputs) == weights + 4 * 10 * (128 + 32)
    assert peak_memory_bytes(model, inputs) == peak_memory_bytes(model, inputs)
    assert peak_memory_bytes(model, {"input": torch.randn(20, 64)}) == weights + 4 * 20 * (128 + 32)


class Temporary(torch.nn.Module):
    """Makes something large and drops it: only the peak knows."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, size):
        return torch.empty(size).sum() * self.weight


def test_peak_memory_sees_what_is_freed_again():
    small, large = (peak_memory_bytes(Temporary(), {"size": size}) for size in (1_000, 1_000_000))
    assert large - small == 4 * 999_000


def test_measure_size_keeps_the_model_as_it_was(tmp_path):
    model = bert_classifier().train()
    model.save_pretrained(tmp_path)
    size = measure_size(model, dummy_inputs(model, 1, 16), tmp_path)
    assert model.training and all(module.training for module in model.modules())
    assert size.non_embedding_parameters == size.parameters - size.embedding_parameters > 0
    assert size.peak_memory_bytes > size.weight_bytes > 0
    assert size.bytes_on_disk == bytes_on_disk(tmp_path)
    assert measure_size(model, dummy_inputs(model, 1, 16)).bytes_on_disk is None
