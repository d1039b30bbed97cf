"""The one way to change a model's structure: a new config and a new state dict make a new model.

    small = rebuild(model, with_block(model.config, block), state)

It refuses a state that does not fit, by one error that lists all of it. `from_pretrained` does what it does for stock
classes: another shape is an error, a missing tensor (such as a new head on an old body) is filled at random and listed
in a logged table.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..attention.dispatch import ATTACHED
from ..errors import CheckpointError, UnsupportedModelError
from .checks import check_floats, check_has_weights
from .classes import EfficientConfigMixin, EfficientMixin, block_of, efficient_class, stock_config

_QUIET = RLock()  # what transformers shows is set for all threads


def class_for(model: PreTrainedModel, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class with the same head as `model` that `config` asks for: the stock or the efficient one."""
    stock = model._stock_class if isinstance(model, EfficientMixin) else type(model)
    return efficient_class(stock, config._stock_class) if isinstance(config, EfficientConfigMixin) else stock


def check_model(model: object) -> PreTrainedModel:
    """Refuse what cannot be rebuilt, before any work.

    Raises:
        UnsupportedModelError: not a transformers model, or a quantised one.
    """
    if not isinstance(model, PreTrainedModel):
        what = f"A transformers model is needed, got {type(model).__name__}"
        if isinstance(model, str):
            raise UnsupportedModelError(f"{what}. Load it first: AutoModel.from_pretrained({model!r}).")
        raise UnsupportedModelError(
            f"{what}. For a PEFT model, call `merge_and_unload()` first, or change the base model and add the "
            "adapters afterwards."
        )
    check_floats(model, "Convert or prune it first and quantise the result.")
    return model


@torch.inference_mode(False)  # what is made in inference mode could never be trained
@torch.no_grad()
def rebuild(
    model: PreTrainedModel, config: PreTrainedConfig, state_dict: dict[str, torch.Tensor] | None = None
) -> PreTrainedModel:
    """A new model with the head of `model`, the structure of `config` and the weights of `state_dict`.

    If the block of `config` is trivial the stock class is built, so that the result loads anywhere. The given model
    stays as it is, and shares no memory with the new one.

    Raises:
        CheckpointError: the state dict does not fit the config exactly.
        UnsupportedModelError: a part of the model has no weights.
    """
    check_model(model)
    check_has_weights(model)
    config = stock_config(config) if block_of(config).is_trivial() else config
    state = model.state_dict() if state_dict is None else state_dict
    passing = model._keys_to_ignore_on_save or ()  # not the model's own, such as projections while it is distilled
    with quietly():
        new, info = class_for(model, config).from_pretrained(
            None,
            config=config,
            state_dict={key: value.detach().clone() for key, value in state.items() if key not in passing},
            dtype=model.dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, with all else that does not fit
        )
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys and kind != "error_msgs"}
    wrong["missing_keys"] = [key for key in wrong.get("missing_keys", []) if not _is_new(key, state)]
    wrong = {kind: keys for kind, keys in wrong.items() if keys}
    if wrong:
        raise CheckpointError(f"The weights do not fit the new structure: {wrong}.")
    for name, tensor in (*new.named_parameters(), *new.named_buffers()):
        if name in state and tensor.dtype != state[name].dtype:  # rounded to the model's, as a head kept in float32
            tensor.data = state[name].detach().clone()
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        getattr(new, "activation_checkpointing_enable", new.gradient_checkpointing_enable)()  # its name from 5.23 on
    if isinstance(model, GenerationMixin) and model.can_generate():
        new.generation_config = copy.deepcopy(model.generation_config)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, parameter in new.named_parameters():
        parameter.requires_grad = name not in frozen
    return new.to(model.device).train(model.training)


def _is_new(key: str, state: dict[str, torch.Tensor]) -> bool:
    """True for a tensor of a variant of which the state knows nothing yet: it keeps its starting values."""
    variant, dot, _ = key.partition(f".{ATTACHED}.")
    return bool(dot) and not any(known.startswith(variant + dot) for known in state)


@contextmanager
def quietly() -> Iterator[None]:
    """Nothing is read from a disk here, so there is nothing to wait for; and what is missing is known."""
    with _QUIET:
        has_bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if has_bar:
                logging.enable_progress_bar()


def is_portable(model: PreTrainedModel) -> bool:
    """True if a saved copy loads with the stock class, without hf_efficient."""
    return block_of(model.config).is_trivial()
