"""A tiny model of the same architecture, made from any config by rule.

    config = tiny_config(model.config)          # the same switches and patterns, small sizes
    model = tiny_model(config)                  # weights large enough that every mistake shows

What is found and proven on the tiny model holds for the large one, because transformers builds both by the same code.
"""

import copy
import linecache
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from ...errors import UnsupportedModelError
from .sizes import WAYS, Way, all_fields, kind_of, shrunk

MAX_PARAMETERS = 30_000_000
MAX_PARTLY = 4  # tiny models that run with a text alone, before that is enough

# From the most plain class to those with heads: what a type has first is what is looked at.
CLASSES = (
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES",
)
Made = TypeVar("Made")


class NotTinyError(UnsupportedModelError):
    """A model of a tiny config cannot be built, or not be fed: one with other sizes might."""


class PartlyFedError(NotTinyError):
    """A tiny model runs, but with none of the images or sounds that it also takes: one with other sizes might."""


def tiny_config(config: PreTrainedConfig, way: Way = WAYS[0]) -> PreTrainedConfig:
    """The same architecture with small sizes: what is no size (switches, kinds of layers, activations) stays."""
    return copy.deepcopy(config) if way.as_it_is else type(config)(**shrunk(config, way))


def first_tiny(config: PreTrainedConfig, make: Callable[[PreTrainedConfig, bool], Made]) -> Made:
    """What `make` gives for the first of the tiny configs for which it does not fail.

    Where an error names fields, their numbers are left as they were, and those that said nothing say something.

    Parameters:
        make: of a tiny config; also told whether the model is to be fed with all that it takes. Where that fails
            `MAX_PARTLY` times with a `PartlyFedError`, the first of those that could be fed in part is made.

    Raises:
        NotTinyError: it fails for all of them; the first reason is said.
    """
    problem: Exception | None = None
    partly: list[Way] = []
    for way in WAYS:
        if len(partly) == MAX_PARTLY and not way.as_it_is:  # a config that is small already may be fed
            continue
        for _ in range(3):
            try:
                return make(tiny_config(config, way), True)
            except PartlyFedError as error:
                partly.append(way)
                words = _words(error)
            except Exception as error:  # whatever the code of a config or a model may raise
                problem = problem or error
                words = _words(error)
            fields = dict(all_fields(config))
            kept = words & {
                name for name, value in fields.items() if value is not None and kind_of(name)[0] not in ("", "image")
            }
            filled = words & {name for name, value in fields.items() if value is None}
            filled |= {word for word in words if "." in word}
            if not kept - set(way.kept) | filled - set(way.filled):
                break
            way = replace(way, kept=(*way.kept, *sorted(kept)), filled=(*way.filled, *sorted(filled)))
    if partly:
        return make(tiny_config(config, partly[0]), False)
    assert problem is not None
    if isinstance(problem, NotTinyError):
        raise problem
    reason = " ".join(str(problem).split())
    raise NotTinyError(f"No tiny {config.model_type} config could be made: {reason}") from problem


def _words(error: Exception) -> set[str]:
    """The words of an error; if it is about a None those of the line that it comes from too, and if a config has no
    such field `NameOfTheConfig.field`."""
    source, text = error.__cause__ or error, str(error)
    missing = re.findall(r"'(\w+Config)' object has no attribute '(\w+)'", text)
    line = line_of(source) if "NoneType" in text else ""
    return {*re.findall(r"\w+", f"{text} {line}"), *(f"{kind}.{name}" for kind, name in missing)}


def line_of(error: BaseException) -> str:
    """The line of code that an error comes from."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno) if trace is not None else ""


def model_classes(config: PreTrainedConfig) -> Iterator[type[PreTrainedModel]]:
    """The classes of transformers for a config, its plain model first; then what `AutoModel.register` was given."""
    seen = set()
    for table in CLASSES:
        names = getattr(modeling_auto, table, {}).get(config.model_type, ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in seen and (model_class := getattr(transformers, name, None)) is not None:
                seen.add(name)
                yield model_class
    if not seen:
        for auto in vars(modeling_auto).values():
            own = getattr(getattr(auto, "_model_mapping", None), "_extra_content", {}).get(type(config), ())
            yield from own if isinstance(own, tuple | list) else (own,)


def tiny_model(config: PreTrainedConfig, *model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A model of a tiny config, in eval mode and float32: of a given class, or the plainest that there is.

    Raises:
        NotTinyError: no class of transformers builds it, or it is not tiny.
    """
    problem: Exception | str = "transformers has no model class for it"
    for one in model_class or model_classes(config):
        try:
            with torch.device("meta"), no_init_weights():
                count = sum(parameter.numel() for parameter in one(copy.deepcopy(config)).parameters())
            if count > MAX_PARAMETERS:
                problem = f"still {count:,} parameters"
                continue
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                return _with_strong_weights(one(copy.deepcopy(config)).eval().float())
        except Exception as error:  # whatever the code of a model may raise
            problem = error
    cause = problem if isinstance(problem, Exception) else None
    raise NotTinyError(f"No tiny {config.model_type} model could be built: {problem}") from cause


@torch.no_grad()
def _with_strong_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Weights with which a wrong mask, head or neuron shows in the output; those of a new model are too small."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            inputs = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
            module.weight.normal_(0, 1 / math.sqrt(inputs), generator=generator)
            if module.bias is not None:
                module.bias.normal_(0, 0.1, generator=generator)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            strong = 1 / math.sqrt(module.weight[0].numel())
            if module.weight.std() < strong / 2:  # after several weak ones all tokens are alike
                module.weight.normal_(0, strong, generator=generator)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0, 1, generator=generator)
            if module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
        elif type(module).__name__.endswith("Experts"):
            for parameter in module.parameters(recurse=False):
                if parameter.ndim == 3:
                    parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]), generator=generator)
    state = model.state_dict()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and re.search(r"(lambda|gamma|scale)[^.]*(\.weight)?$", name):
            parameter.fill_(0.7)  # layer scales of 1e-6 hide what a layer does, and of 1 that they are there
        elif parameter.ndim < 2 and re.search(r"(gate|alpha)[^.]*$", name) and not parameter.any():
            parameter.fill_(0.7)  # closed gates hide what is behind them
        elif parameter.ndim > 1 and not parameter.any():  # zeros hide what they are multiplied with, or all stem from
            parameter.normal_(0, 1 / math.sqrt(parameter.shape[0]), generator=generator)
    for name, buffer in model.named_buffers():  # of codebooks that are learned without gradients
        if buffer.is_floating_point() and buffer.ndim > 1 and name in state and not buffer.any():
            buffer.normal_(0, 1, generator=generator)
    model.tie_weights()
    for module in model.modules():
        if getattr(getattr(module, "config", None), "use_cache", False) is True:
            module.config.use_cache = False  # a layer runs again and again on the same tokens
    return model
