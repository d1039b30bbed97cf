"""Which hidden states a model is asked for: the mapped ones alone, where transformers can give them so."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from transformers import BertConfig, BertModel


def wanted_states(positions: Iterable[int]) -> dict[str, Any]:
    """The keyword of a forward for these positions of `hidden_states`; none where there are none."""
    chosen = sorted(set(positions))
    return {"output_hidden_states": chosen if selects_positions() else True} if chosen else {}


@cache
def selects_positions() -> bool:
    """Whether `output_hidden_states=[1]` keeps `hidden_states[1]` alone, as transformers 5.23 does.

    5.17 counts layers without the embeddings there, which would be off by one without an error; so a model is asked.
    """
    config = BertConfig(vocab_size=1, hidden_size=1, num_hidden_layers=1, num_attention_heads=1, intermediate_size=1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        states = BertModel(config).eval()(torch.tensor([[0]]), output_hidden_states=[1]).hidden_states
    return [state is None for state in states] == [True, False]
