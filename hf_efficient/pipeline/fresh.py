"""A model that is trained from nothing: every number of its config is bounded before anything is made of it.

    config = fresh_config({"model_type": "vit", "hidden_size": 64}, tokenizer)
    check_fresh(run.skeleton)                  # it can be built, reads inputs, and fits into this machine

Sizes are checked by name where hf_efficient knows the model type, by general limits for all others; then the model is
built without memory, while its parts are counted.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch.nn.modules import module as hooks
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokenizer import token_fields
from ..errors import ConfigError, HfEfficientError, shown, unknown_name
from ..models.block import MAX_LAYERS, MAX_ROWS, check_stock_sizes
from ..models.families import FAMILIES
from ..stages.settings import check_keys

MAX_MODULES = 100_000  # 1,024 layers have about 20,000
MAX_REAL = 1e12
# Fields that count parts; those that count in powers of a wave length may be larger than any size.
PARTS = ("layer", "depth", "stage", "block", "expert")
SIZES = ("size", "dim", "width")
WAVES = ("theta", "base", "timescale")


def fresh_config(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedConfig:
    """The config of a model that is trained from nothing, and reads what its tokenizer makes; ConfigError for a type,
    field, size or value that it cannot have."""
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if fields["model_type"] not in known:
        raise unknown_name("model.config.model_type", fields["model_type"], known.keys())
    config_class = known[fields["model_type"]]
    names = {field.name for field in dataclasses.fields(config_class)} | {"model_type", "num_labels", "head_dim"}
    check_keys(fields, sorted(names), "model.config")
    if tokenizer is not None:
        ids = token_fields(tokenizer, config_class)
        fields = {name: value for name, value in ids.items() if name in names or name.startswith("decoder")} | fields
    if fields["model_type"] in FAMILIES:
        check_stock_sizes(fields, FAMILIES[fields["model_type"]])
    for name, value in fields.items():
        _check_numbers(value, name, f"model.config.{name}")
    with _as_config_error("cannot be made"):
        return transformers.AutoConfig.for_model(**fields)


def check_fresh(build: Callable[[], PreTrainedModel]) -> None:
    """ConfigError unless `build` makes a model, without memory for weights, that reads inputs and would fit here."""
    from ..models.inputs import dummy_inputs
    from ..models.modes import evaluating

    with _as_config_error("cannot be built"), _few_parts():
        model = build()
    bytes_needed, memory = 4 * sum(weight.numel() for weight in model.parameters()), _memory()
    if bytes_needed > memory:
        raise ConfigError(
            f"model.config: the weights alone would take {bytes_needed / 1e9:,.0f} GB, and this machine has "
            f"{memory / 1e9:,.0f} GB. Lower the sizes."
        )
    if model.config.is_encoder_decoder:  # their forwards look at values, and here there are none
        return
    with _as_config_error("cannot read its inputs", but="meta"), evaluating(model), torch.no_grad():
        model(**{name: value.to("meta") for name, value in dummy_inputs(model, 1, 8).items()})


def _check_numbers(value: Any, name: str, path: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_numbers(item, str(key), f"{path}.{key}")
        return
    if isinstance(value, list | tuple):
        if len(value) > MAX_LAYERS:
            raise ConfigError(f"{path} has {len(value):,} entries; hf_efficient accepts up to {MAX_LAYERS}.")
        for item in value:
            _check_numbers(item, name, path)
        return
    if type(value) in (int, float) and ("drop" in name or name.endswith("_prob")) and not 0 <= value <= 1:
        raise ConfigError(f"{path} is a probability, so from 0 to 1, and not {shown(value)}.")
    limit = MAX_REAL
    if type(value) is int and not any(word in name for word in WAVES):
        counts = any(word in name for word in PARTS) and not any(word in name for word in SIZES)
        limit = MAX_LAYERS if counts else MAX_ROWS
    if type(value) in (int, float) and abs(value) > limit:
        raise ConfigError(f"{path} is {shown(value)}; hf_efficient accepts up to {limit:,.0f}.")


@contextmanager
def _as_config_error(what: str, but: str | None = None) -> Iterator[None]:
    """Whatever a model of transformers raises is a ConfigError; `but`: not if the message has this word."""
    try:
        yield
    except HfEfficientError:
        raise
    except Exception as error:  # config and model classes raise what they like
        reason = " ".join(str(error).split())[:300].rstrip(".")
        if but is None or but not in reason:
            raise ConfigError(
                f"model.config: a model of these values {what}: {type(error).__name__}: {reason}. Change the value "
                "that this is about."
            ) from error


@contextmanager
def _few_parts() -> Iterator[None]:
    """A model of more modules than any real one is given up while it is built, however its config says so."""
    count = 0

    def one_more(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES:
            raise ConfigError(
                f"model.config: the model would have more than {MAX_MODULES:,} modules. Lower the sizes."
            )

    handle = hooks.register_module_module_registration_hook(one_more)
    try:
        yield
    finally:
        handle.remove()


def _memory() -> float:
    """Bytes of main memory; without end where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")
