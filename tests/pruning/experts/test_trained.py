"""Which experts a trained mixture can do without: by REAP it loses less than by the controls."""

import pytest
import torch

from hf_efficient import PruningConfig, prune

from .tiny import VOCABULARY, make

TOPICS, LENGTH = 8, 24


def texts(rows: int, seed: int) -> torch.Tensor:
    """`[rows, LENGTH]`: of each topic a chain of its own over its part of the vocabulary, frequent topics first."""
    chains = torch.Generator().manual_seed(0)
    following = torch.stack([torch.randperm(VOCABULARY - 4, generator=chains) + 4 for _ in range(TOPICS)])
    generator = torch.Generator().manual_seed(seed)
    often = 1.0 / torch.arange(1, TOPICS + 1)
    topics = torch.multinomial(often, rows, replacement=True, generator=generator)
    tokens = [torch.randint(4, VOCABULARY, (rows,), generator=generator)]
    for _ in range(LENGTH - 1):
        drawn = torch.randint(4, VOCABULARY, (rows,), generator=generator)
        own = following[topics, tokens[-1] - 4]
        tokens.append(torch.where(torch.rand(rows, generator=generator) < 0.1, drawn, own))
    return torch.stack(tokens, 1)


def perplexity(model, rows: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model.eval()(input_ids=rows, labels=rows).loss.exp())


@pytest.mark.thorough
def test_reap_keeps_more_than_the_controls():
    model = make("qwen3_moe", num_experts=16, num_hidden_layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(600):
        rows = texts(32, seed=100 + step)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    held_out, data = texts(256, seed=1), [{"input_ids": texts(64, seed=2)}]
    found = {"dense": [perplexity(model, held_out)]}
    for importance in ("reap", "frequency", "random"):
        for seed in range(5 if importance == "random" else 1):
            config = PruningConfig(
                ratio=0.3, granularity="expert", importance=importance, reconstruct=False, seed=seed
            )
            found.setdefault(importance, []).append(perplexity(prune(model, config, data), held_out))
    print(found)
    assert found["dense"][0] < 20 < VOCABULARY
    assert found["reap"][0] < min(found["random"])
    assert found["reap"][0] <= found["frequency"][0]
