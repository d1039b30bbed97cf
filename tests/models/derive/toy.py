"""An architecture that nobody knows: other names than any model of transformers, attention of its own."""

import re
import sys
from types import ModuleType

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ...pages import ROOT, blocks

# The documentation's model, which calls the attention interface, without its registration.
[DOCUMENTED, *_] = re.split("^AutoConfig.register", blocks(ROOT / "docs/howto/own-models.md", "python")[0], flags=re.M)


class ToyConfig(PreTrainedConfig):
    model_type = "toy_of_the_tests"

    def __init__(self, vocab_size=90, dim=32, depth=3, n_heads=4, mlp_dim=40, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.dim, self.depth, self.n_heads, self.mlp_dim = vocab_size, dim, depth, n_heads, mlp_dim


class Mixer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.mix, self.out = nn.Linear(config.dim, 3 * config.dim), nn.Linear(config.dim, config.dim)

    def forward(self, states, hidden):
        query, key, value = (
            part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in self.mix(states).chunk(3, -1)
        )
        scores = query @ key.mT / query.shape[-1] ** 0.5
        weights = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.first, self.second = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.mixer = Mixer(config)
        self.wide, self.narrow = nn.Linear(config.dim, config.mlp_dim), nn.Linear(config.mlp_dim, config.dim)

    def forward(self, states, hidden):
        states = states + self.mixer(self.first(states), hidden)
        return states + self.narrow(self.wide(self.second(states)).relu())


class ToyModel(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = self.words(input_ids)
        for block in self.blocks:
            states = block(states, mask == 0)
        return BaseModelOutput(last_hidden_state=states)


def documented(monkeypatch, name, **changes):
    """A module of that name with the documentation's model, in which some words are others."""
    code = DOCUMENTED
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(code, vars(module))
    return module


def register():
    AutoConfig.register(ToyConfig.model_type, ToyConfig, exist_ok=True)
    AutoModel.register(ToyConfig, ToyModel, exist_ok=True)
