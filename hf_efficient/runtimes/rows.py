"""Models that read images among their tokens: can a program of one take any number of rows?

    check_rows(config, lambda: model)          # nothing, or an UnsupportedModelError that says why not

Some count their images while they are traced (LLaVA), others lay out patches by the numbers in their inputs (Qwen-VL):
a program would hold for the traced batch alone. That is found out on a tiny model of the same class, before any long
work.
"""

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from .formats import FORMATS, hushed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

MAX_REASON = 160  # characters of what a tracer says


def check_rows(config: Any, model: Callable[[], "PreTrainedModel"]) -> None:
    """`model` gives one of `config`, on any device; it is asked for only where images stand among tokens.

    Raises:
        UnsupportedModelError: its program would take one number of rows only.
    """
    from ..models.inputs import image_token

    if image_token(config) is None:
        return
    from ..models.classes import stock_config
    from ..models.derive.inputs import tiny_inputs
    from ..models.derive.tiny import NotTinyError, first_tiny, tiny_model
    from ..models.rebuild import quietly

    real = model()
    kind = getattr(real, "_stock_class", type(real))

    def fed(small: Any, whole: bool) -> tuple[Any, dict[str, Any]]:
        tiny = tiny_model(small, kind)
        return tiny, tiny_inputs(tiny, whole)

    try:
        with quietly():
            tiny, inputs = first_tiny(stock_config(config), fed)
    except NotTinyError:
        return  # what cannot be tried is seen in the export itself
    if "pixel_values" in inputs and "input_ids" in inputs and (problem := _problem(tiny, inputs)):
        raise UnsupportedModelError(
            f"{type(real).__name__} cannot be exported for any number of rows: {problem}. That shows on a tiny "
            "model of its class and holds for every format. Stay in PyTorch, or export its parts: the model of texts."
        )


def _problem(model: "PreTrainedModel", inputs: dict[str, "Tensor"]) -> str | None:
    """Why a trace of `model` fixes the number of its rows, if it does."""
    import torch
    from transformers.exporters.auto import EXPORT_BACKENDS, get_exporter_class

    backend = FORMATS["torch"].backend
    free = {name: {0: torch.export.Dim.AUTO} for name in inputs}
    try:
        with hushed(), redirect_stderr(io.StringIO()), torch.no_grad():  # a tracer prints all that it has traced
            exported = get_exporter_class(backend)().export(
                model, dict(inputs), config=EXPORT_BACKENDS[backend].config(dynamic_shapes=free)
            )
    except Exception as error:  # the tracer raises whatever the code of a model makes it run into
        return f"it cannot be traced ({' '.join(str(error).split())[:MAX_REASON]})"
    if len({value.shape[0] for value in inputs.values()}) > 1:
        return None  # which of them belong to the first row is not known
    first = {name: value[:1] for name, value in inputs.items()}
    try:
        with torch.no_grad():
            exported.program.module()(**first)
    except Exception as error:  # AssertionError: Guard failed: pixel_values.size()[0] == 2
        return f"traced with two, it does not take one ({' '.join(str(error).split())[:MAX_REASON]})"
    return None
