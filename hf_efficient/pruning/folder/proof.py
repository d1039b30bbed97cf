"""Can the layers of an architecture be run one by one? Tried on a tiny model of it, before any long work.

    gives = prove_layers(model)          # or UnsupportedModelError

What the tiny model's layers are given must be the same whether those before them are computed or hand on what they
get; and run one by one, head last, they must give the answer of the whole.
"""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import UnsupportedModelError
from ...models.anatomy import Anatomy
from ...models.classes import EfficientMixin, stock_config
from ...models.derive.inputs import tiny_inputs
from ...models.derive.tiny import first_tiny, tiny_model
from ...models.on_disk import WHOLE
from ...models.rebuild import quietly
from ..score.calibration import answer_of
from ..score.handing import Batch, NotAlone, find_layers, watching

TOLERANCE = 1e-4


def prove_layers(anatomy: Anatomy) -> list[int | str]:
    """What a layer gives beside its states, as `Layers` wants it.

    Raises:
        UnsupportedModelError: several stacks, or layers that hand something on.
    """
    model, family = anatomy.model, anatomy.family
    kind = model._stock_class if isinstance(model, EfficientMixin) else type(model)
    why = None
    if len(anatomy.stacks) != 1 or anatomy.config.is_encoder_decoder:
        why = f"it has {len(family.stacks)} stacks of layers"
    elif family.relative_bias:
        why = "its first layer makes the position bias of all others"
    if why is None:
        with quietly(), torch.inference_mode(False), torch.no_grad():
            why, gives = _tried(stock_config(anatomy.config), kind)
    if why is not None:
        raise UnsupportedModelError(f"The layers of {kind.__name__} cannot be run one by one: {why}. {WHOLE}")
    return gives


def _tried(config: PreTrainedConfig, kind: type[PreTrainedModel]) -> tuple[str | None, list[int | str]]:
    def make(small: PreTrainedConfig, whole: bool) -> tuple[str | None, list[int | str]]:
        model = tiny_model(small, kind)
        inputs = tiny_inputs(model, whole)
        return _compared(model, inputs)

    try:
        return first_tiny(config, make)
    except UnsupportedModelError as error:
        return f"no tiny model of it could be tried ({error})", []


def _compared(model: PreTrainedModel, inputs: Batch) -> tuple[str | None, list[int | str]]:
    stack = Anatomy.of(model).stacks[0]
    with watching(stack.layers) as seen:
        expected = answer_of(model, inputs)
    try:
        layers = find_layers(model, stack.layers, inputs, seen)
        states, recorded = layers.record(inputs)
        for index, call in enumerate(recorded):
            states = layers.call(index, states, call)
        answer = layers.finish(inputs, states, answer_of)
    except NotAlone as error:
        return str(error), []
    except Exception as error:  # whatever the code of a model may raise where something is missing
        return f"one by one they fail ({type(error).__name__}: {error})", []
    if answer.shape != expected.shape or not torch.allclose(answer, expected, atol=TOLERANCE, rtol=TOLERANCE):
        return "one by one they give another answer", []
    return None, layers.gives
