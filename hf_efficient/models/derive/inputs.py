"""Inputs for a tiny model of any sort, found by rule: texts, images, videos, sounds, series, alone or together.

model(**tiny_inputs(model))

What the forward takes is made by the names of its parameters (`makers`), the richest choice first. Where the model
fails, the error says what else it wants, and the first module that reads an input how wide it must be.
"""

import inspect
import linecache
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .makers import FRAMES, IMAGE_FORMS, MAIN, PATCHES, ROWS, Inputs, find_maker, make
from .tiny import NotTinyError, PartlyFedError, line_of

MAX_TRIES = 8  # of one choice of inputs, each time with what the last error asked for
# Beside `MAIN` what another tower reads.
MORE = re.compile(
    r"(image|audio|protein)_(pixel_values|input_features|input_ids)|flattened_patches|protein_attention_mask"
    r"|image_embeds_position_mask|cross_attention_mask|future_values"
)
NEVER = re.compile(r".*past_key_values|.*labels|.*cache.*|.*outputs|inputs_embeds|return_.*|use_.*|output_.*|kwargs")


def tiny_inputs(model: PreTrainedModel, whole: bool = False) -> Inputs:
    """Inputs with which a tiny model runs: two texts, one of them padded, images, sounds; the most that it takes.

    Raises:
        PartlyFedError: it is to be fed as a `whole`, and runs with none of the images and sounds that it takes.
        NotTinyError: it runs with none of them.
    """
    problem: Exception | None = None
    tried: set[tuple] = set()
    choices = list(_choices(model))
    for names in choices:
        error: Exception | None = None
        for form, wanted in IMAGE_FORMS.items():
            is_asked = error is None or (re.search(wanted, str(error)) and any("pixel" in name for name in names))
            if is_asked and (names, form) not in tried:
                tried.add((names, form))
                inputs, error = _mended(model, names, form)
                if inputs is not None and whole and problem and {*choices[0]} - {*inputs, "attention_mask"}:
                    raise PartlyFedError(f"With all its inputs a tiny {type(model).__name__} does not run: {problem}")
                if inputs is not None:
                    return inputs
                problem = problem or error
    reason = problem or f"it takes {', '.join(inspect.signature(model.forward).parameters)}"
    raise NotTinyError(f"No inputs could be made for a tiny {type(model).__name__}: {reason}")


def _choices(model: PreTrainedModel) -> Iterator[tuple[str, ...]]:
    """The richest first: all that the forward takes, each main input with what belongs to it, then hidden states."""
    parameters = inspect.signature(model.forward).parameters
    main_names = model.main_input_name
    main_names = [main_names] if isinstance(main_names, str) else list(main_names)
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    needed = [name for name in needed if find_maker(name)]
    more = [name for name in parameters if MORE.fullmatch(name)]
    if any("video" in name for name, _ in model.named_children()):
        more.append("pixel_values_videos")  # which other models read as they do images
    known = [name for name in (*MAIN, *main_names, *needed, *more) if name in parameters and find_maker(name)]
    if "input_ids" not in known and "attention_mask" not in needed:
        known = [name for name in known if name != "attention_mask"]  # of what else, an error will say
    text = [name for name in known if name in ("input_ids", "attention_mask", "decoder_input_ids")]
    others = [name for name in known if name not in (*text, "hidden_states", "inputs_embeds")]
    main = [name for name in known if name in (*main_names, "decoder_input_ids")]
    fewer = [name for name in others if name not in more or name in (*main_names, *needed)]
    for chosen in (
        [*text, *others],
        [*text, *fewer],
        [*fewer, *main],
        fewer,
        main,
        text,
        ["hidden_states"],
        ["inputs_embeds"],
    ):
        chosen = [name for name in chosen if name in known]
        if chosen:
            yield tuple(dict.fromkeys([*chosen, *needed]))


def _mended(model: PreTrainedModel, names: tuple[str, ...], form: str) -> tuple[Inputs | None, Exception | None]:
    """Inputs of these names with which the model runs, or why it does not."""
    problem: Exception | None = None
    shapes: dict[str, tuple[int, ...]] = {}  # where the first reader of an input wants another one
    for _ in range(MAX_TRIES):
        wanted: dict[str, tuple[int, ...]] = {}
        made: Inputs = {}
        try:
            made = {name: _placed(value, model) for name, value in make(model, names, form, shapes).items()}
            _run(model, made, wanted)
            return made, None
        except Exception as error:  # whatever the code of a model may raise
            problem = error
            more = _asked(error, model, names)
            wanted = {name: shape for name, shape in wanted.items() if name not in shapes}
            wanted = _by_error(error, made) or wanted
            if both := re.search(r"both `?(\w+)`? and `?(\w+)", str(error)):
                names, more = tuple(name for name in names if name != both[2]), []
                wanted = wanted or {"": ()}
            if not more and not wanted.items() - shapes.items():
                break
            names = (*names, *more)
            if not more:
                shapes |= wanted
    return None, problem


def _placed(value: Tensor, model: PreTrainedModel) -> Tensor:
    return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)


def _by_error(error: Exception, inputs: Inputs) -> dict[str, tuple[int, ...]]:
    """The shape that an error asks for: as many channels; of a sound more numbers at each time."""
    text = str(error)
    if channels := re.search(r"to have (\d+) channels, but got (\d+) channels", text):
        wanted, given = int(channels[1]), int(channels[2])
        for name, value in inputs.items():
            if value.is_floating_point() and value.ndim > 2 and value.shape[1] == given:
                rest = value.shape[2:] if value.ndim > 3 else [max(FRAMES, value.shape[2])]
                return {name: (value.shape[0], wanted, *rest)}
            if value.is_floating_point() and value.ndim == 3 and value.shape[2] == given:
                return {name: (value.shape[0], value.shape[1], wanted)}
    if counted := re.search(r"(?:(image|audio|video).*)?tokens: (\d+), .*features:? (\d+)", text, re.IGNORECASE):
        return {f"{(counted[1] or 'image').lower()} tokens": (int(counted[3]) // ROWS,)}
    if shape := re.search(r"value tensor of shape \[(\d+), \d+\] cannot be broadcast to indexing result", text):
        kind = re.search("image|audio|video", line_of(error))
        return {f"{kind[0] if kind else 'image'} tokens": (int(shape[1]) // ROWS,)}
    name = next((name for name in inputs if name.endswith("input_features")), None)
    if name is None:
        return {}
    rows, *rest, bins = inputs[name].shape
    rest = [rows, *rest] if len(rest) > 1 else [rows, FRAMES]
    behind = re.search(r"mat1 and mat2 shapes cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)", text)
    added = re.search(r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\).*(\d)", text)
    if behind is not None:
        return {name: (*rest, bins * int(behind[2]) // int(behind[1]))}
    if added is not None and added[3] == "1" and int(added[2]) < int(added[1]) == rest[-1]:  # of fewer frames
        return {name: (*rest[:-1], int(added[2]), bins)}
    return {name: (*rest, int(added[2]))} if added is not None and int(added[1]) == bins else {}


def _run(model: PreTrainedModel, inputs: Inputs, wanted: dict[str, tuple[int, ...]]) -> None:
    """Run a model; what the first module that reads an input wants instead is put into `wanted`."""
    seen: set[str] = set()

    def before(module: nn.Module, args: tuple) -> None:
        given = next((one for one in args if isinstance(one, Tensor) and one.is_floating_point()), None)
        if given is None:
            return
        same = [name for name, value in copies.items() if value.data_ptr() == given.data_ptr()]
        for name, value in inputs.items():
            alike = value.is_floating_point() and value.numel() == given.numel() and not same
            if name not in seen and (name in same or alike):
                seen.add(name)
                wanted.pop(name, None)
                is_read = isinstance(module, nn.Linear) and given.shape[-1] == module.in_features and not same
                shape = None if is_read else _wanted_shape(module, value)
                if shape is not None and shape != tuple(value.shape):
                    wanted[name] = shape

    copies = {name: value.clone() for name, value in inputs.items()}
    for name, value in inputs.items():
        if name == "input_values" and value.ndim == 2:
            wanted[name] = (value.shape[0], 1, value.shape[1])  # unless a module reads it
        elif name == "input_features" and value.ndim == 3:
            wanted[name] = (value.shape[0], 1, value.shape[2], value.shape[1])
    with ExitStack() as hooks, torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for module in model.modules():
            if next(module.children(), None) is None and next(module.parameters(recurse=False), None) is not None:
                hooks.callback(module.register_forward_pre_hook(before).remove)
        model(**copies)


def _wanted_shape(module: nn.Module, value: Tensor) -> tuple[int, ...] | None:
    """The shape of an input of the same sort that a module can read: `[rows, frames, width]` and the like."""
    rows, length = value.shape[0], max(value.shape[1:], default=1)
    if isinstance(module, nn.Linear | nn.LayerNorm):
        width = module.in_features if isinstance(module, nn.Linear) else module.normalized_shape[-1]
        if value.ndim == 2 and rows > 2:  # patches
            return rows, width
        return rows, PATCHES if value.ndim > 3 else min(length, FRAMES), width
    if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
        return rows, module.in_channels, length
    if isinstance(module, nn.Conv2d | nn.Conv3d) and value.ndim == 2 and rows > 2:
        return rows, module.in_channels, *module.kernel_size
    if isinstance(module, nn.Conv2d) and value.ndim == 3:  # the frames first
        return rows, value.shape[2], value.shape[1]
    if isinstance(module, nn.Conv2d) and value.ndim == 4 and value.shape[1] != module.in_channels:
        return rows, module.in_channels, *value.shape[2:]
    return None


def _asked(error: Exception, model: PreTrainedModel, given: tuple[str, ...]) -> list[str]:
    """Parameters of the forward that an error asks for: by its words, or because one was None where it came from."""
    parameters = inspect.signature(model.forward).parameters
    names = [name for name in parameters if name not in given and not NEVER.fullmatch(name) and find_maker(name)]
    words = set(re.findall(r"\w+", str(error)))
    named = [name for name in names if name in words]
    trace, frames = error.__traceback__, []
    while trace is not None and not named:
        frames.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    if "None" not in str(error) and not isinstance(error, AttributeError | TypeError):
        frames = []
    for lines in (1, 10):  # of a call, all its arguments
        for frame, number in reversed(frames):
            text = "".join(linecache.getline(frame.f_code.co_filename, number + more) for more in range(lines))
            values: Mapping[str, Any] = frame.f_locals
            missing = [name for name in names if name in values and values[name] is None]
            named = named or [name for name in missing if re.search(rf"\b{name}\b", text)]
    kinds = {name: name.removesuffix("_ids") for name in names if name.endswith("_ids")}  # lang_ids: of a language
    return named or [name for name, kind in kinds.items() if any(word.lower().startswith(kind) for word in words)]
