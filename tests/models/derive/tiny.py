"""Tiny models of any type, as the tests of derived entries want them."""

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_efficient.models.derive.inputs import tiny_inputs
from hf_efficient.models.derive.tiny import tiny_config, tiny_model


def make(model_type, **changes):
    """A tiny model and inputs for it."""
    model = tiny_model(tiny_config(CONFIG_MAPPING[model_type](**changes)))
    return model, tiny_inputs(model)


def outputs(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs)[0]
