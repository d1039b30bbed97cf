"""Which hidden states a model is asked for: the mapped ones alone, where transformers can give them so."""

from functools import cache
from typing import Any

import torch
from transformers import BertConfig, BertModel

from .layer_map import Pairs


def wanted_states(pairs: dict[str, Pairs], side: int) -> dict[str, Any]:
    """The keyword of a forward; side 0 is the student, 1 the teacher. None where nothing is mapped."""
    positions = sorted({pair[side] for own in pairs.values() for pair in own})
    if not positions:
        return {}
    return {"output_hidden_states": positions if selects_positions() else True}


@cache
def selects_positions() -> bool:
    """Whether `output_hidden_states=[1]` keeps `hidden_states[1]` alone, as transformers 5.23 does.

    5.17 counts layers without the embeddings there, which would be off by one without an error; so a model is asked.
    """
    config = BertConfig(vocab_size=1, hidden_size=1, num_hidden_layers=1, num_attention_heads=1, intermediate_size=1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        states = BertModel(config).eval()(torch.tensor([[0]]), output_hidden_states=[1]).hidden_states
    return [state is None for state in states] == [True, False]
