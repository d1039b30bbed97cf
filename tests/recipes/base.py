"""A small recipe, and it with one value replaced."""

import copy

import pytest

from hf_efficient.errors import ConfigError
from hf_efficient.recipes.recipe import Recipe

BASE = {
    "name": "demo",
    "task": "text-classification",
    "model": {"name_or_path": "bundled:minilm-l6"},
    "data": {"name_or_path": "bundled:bbc-news", "max_length": 64},
    "teacher": {"epochs": 1},
    "stages": [
        {"attention": {"kind": "local", "window": 8}},
        {"prune": {"ratio": 0.5}},
        {"distill": {"losses": {"kd": 1, "ce": 0.5}}},
    ],
}


def changed(path, value):
    """BASE with one value replaced: `changed(["stages", 1, "prune", "ratio"], 2)`."""
    data = copy.deepcopy(BASE)
    target = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return data


def refused(data):
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict(data)
    return str(caught.value)
