"""No kind builds anything that grows with the square of the length, forward or backward, causal or not."""

import json

import pytest

from hf_efficient.attention.registry import ATTENTIONS

from ..processes import python

HEADS, DIM = 4, 16
KINDS = {
    "local": {"window": 64, "global_tokens": 1},
    "strided": {"block_size": 64, "num_blocks": 7, "global_tokens": 1},
    "topk": {"block_size": 64, "top_k": 8, "global_tokens": 1},
    "lsh": {"block_size": 64, "num_hashes": 2, "num_buckets": 64},
    "linear": {"feature_map": "hedgehog"},
    "local_linear": {"window": 64, "feature_map": "hedgehog"},
    "additive": {},
    "kernel": {"feature_dim": 16},
}

# Prints what the passes add to the largest resident size so far, in bytes. Not ru_maxrss: a child process starts with
# its parent's.
PROGRAM = """
import json, sys, torch
from hf_efficient import AttentionConfig
from hf_efficient.attention.registry import ATTENTIONS
from hf_efficient.attention.naive import naive_full_attention
from hf_efficient.attention.variant import HeadShape

torch.set_num_threads(1)
kind, fields, heads, dim, length = json.loads(sys.argv[1])

def attention(query, key, value, causal):
    if kind == "naive":
        return naive_full_attention(query, key, value, causal=causal)
    return variant.attend(query, key, value, None, causal=causal, scaling=None, dropout=0.0, bias=None)

if kind != "naive":
    variant = ATTENTIONS[kind](AttentionConfig(kind, **fields), HeadShape(heads, heads, dim))
    variant.reset_parameters()

def peak(length):
    for causal in (False, True):
        inputs = (torch.randn(1, heads, length, dim, requires_grad=True) for _ in range(3))
        attention(*inputs, causal).sum().backward()
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak(640)
print(peak(length) - before)
"""


def added_memory(kind: str, length: int) -> int:
    done = python("-c", PROGRAM, json.dumps([kind, KINDS.get(kind, {}), HEADS, DIM, length]))
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def scores(length: int) -> int:
    """The bytes of one float32 number for each pair and head."""
    return length * length * HEADS * 4


def test_every_kind_has_its_settings():
    ours = {kind for kind, variant in ATTENTIONS.items() if variant.__module__.startswith("hf_efficient.")}
    assert set(KINDS) == ours - {"merging"}  # softmax over the tokens that are left


@pytest.mark.processes
def test_the_meter_sees_scores():
    assert added_memory("naive", 1536) > scores(1536)


@pytest.mark.processes
@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_far_below_quadratic(kind):
    assert added_memory(kind, 16384) < scores(16384) / 12
