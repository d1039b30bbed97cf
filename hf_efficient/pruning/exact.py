"""What a model can lose without another answer: its own windows as windows, units that are zero, tokens never used.

    freed = free(model, tokenizer=tokenizer, texts=corpus)
    freed.model.save_pretrained("out/free"); freed.tokenizer.save_pretrained("out/free")
    print("\n".join(saving.told for saving in freed.savings))

In this order, each only where there is something to gain:

- *dead layers*: all that they add to the stream is exactly zero, and they hand on what they are given to the last bit;
- *dead heads and neurons*: the columns that read them are exactly zero, or all rows that make them are;
- *windows*: layers that the model itself gives a sliding window compute it so (`convert_attention(model, "native")`);
- *vocabulary*: tokens that no text has, with `texts` (`prune_vocabulary`); those texts give the same answers.

What comes out is compared with what was given: it differs by rounding or nothing is returned.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..conversion.convert import convert_attention
from ..errors import ConfigError, UnsupportedModelError
from ..models.anatomy import Anatomy
from ..models.derive.compare import outputs_of
from ..models.gaps import states_of
from ..models.groups import Group, Member, Slice
from ..models.inputs import dummy_inputs
from ..models.modes import evaluating
from ..models.rebuild import check_model, is_portable
from ..models.registry import token_limit
from ..models.stacks import ModelStack
from .cut.surgery import apply_plan
from .cut.vocabulary import prune_vocabulary
from .plan import PruningPlan

LENGTH = 192  # tokens on which both are compared: longer than small windows, so that they count
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # of the largest


@dataclass(frozen=True)
class Saving:
    """What one step found, and the parameters that went with it; `told` is a sentence."""

    name: str
    count: int
    parameters: int
    told: str


@dataclass(frozen=True)
class Freed:
    """The model, its tokenizer (None where none was given), what each step saved, and the largest difference between
    the outputs of both on random tokens, as a part of the largest output."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast | None
    savings: tuple[Saving, ...]
    difference: float

    @property
    def loads_with(self) -> str:
        """`portable` (the stock class) or `plugin` (after `import hf_efficient`)."""
        return "portable" if is_portable(self.model) else "plugin"


@torch.inference_mode(False)
@torch.no_grad()
def free(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast | None = None,
    texts: Iterable[str] | None = None,
) -> Freed:
    """A copy of `model` without what changes no answer; `model` itself where there is nothing of the kind.

    Parameters:
        model: a stock or efficient model of any architecture that can be derived (docs/models.md).
        tokenizer, texts: its fast tokenizer and all that it is for: tokens that stand in none of the texts leave. The
            answers to other texts may change. Both or none.

    Raises:
        ConfigError: one of `tokenizer` and `texts` without the other.
        DataError: there are no texts.
        UnsupportedModelError: nothing can be derived, or the result gives another answer.
    """
    if (tokenizer is None) != (texts is None):
        given, other = ("texts", "tokenizer") if tokenizer is None else ("tokenizer", "texts")
        raise ConfigError(f"{given} without {other}: tokens leave by what the texts of a corpus have. Give both.")
    dense = Anatomy.of(check_model(model))
    for unmade in (True, False):  # a unit that is made of zeros alone may still say something: sigmoid(0) is a half
        steps: list[Saving] = []
        small = _with_windows(_without_dead(dense, steps, unmade), steps)
        difference = _difference(model, small)
        if difference <= TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16]):
            break
    else:
        raise UnsupportedModelError(
            f"Without what is dead, and with its windows as windows, this {type(model).__name__} gives another answer "
            f"(by {difference:.2g} of the largest output), so nothing is taken from it."
        )
    if texts is not None and tokenizer is not None:
        trimmed, short = prune_vocabulary(small, tokenizer, texts)
        gone = len(tokenizer) - len(short)
        told = f"vocabulary: {gone:,} of {len(tokenizer):,} tokens are in no text"
        steps.append(_saving("vocabulary", gone, small, trimmed, told))
        small, tokenizer = trimmed, short
    return Freed(small, tokenizer, tuple(steps), difference)


def _saving(name: str, count: int, before: PreTrainedModel, after: PreTrainedModel, told: str) -> Saving:
    gone = before.num_parameters() - after.num_parameters()
    return Saving(name, count, gone, f"{told}: {gone:,} parameters less." if gone else f"{told}.")


def _without_dead(dense: Anatomy, steps: list[Saving], unmade: bool) -> PreTrainedModel:
    """Layers first, then the heads and neurons of those that stay."""
    layers = dead_layers(dense)
    if layers:
        kept = {
            stack.name: tuple(n for n in range(len(stack.layers)) if (stack.name, n) not in layers)
            for stack in dense.stacks
            if any(name == stack.name for name, _ in layers)
        }
        small = apply_plan(dense, PruningPlan(layers=kept))
        told = f"layers: {len(layers)} of {sum(len(stack.layers) for stack in dense.stacks)} add nothing"
        steps.append(_saving("layers", len(layers), dense.model, small, told))
        dense = Anatomy.of(small)
    for kind, is_neurons in (("heads", False), ("neurons", True)):
        groups = [group for group in dense.groups if group.is_neurons == is_neurons]
        dead = {group: units for group in groups if (units := dead_units(dense.model, group, unmade))}
        if not dead:
            continue
        stay = {group.name: tuple(n for n in range(group.units) if n not in units) for group, units in dead.items()}
        small = apply_plan(dense, PruningPlan(units=stay))
        count = sum(map(len, dead.values()))
        told = f"{kind}: {count:,} of {sum(group.units for group in groups):,} are never read or always zero"
        steps.append(_saving(kind, count, dense.model, small, told))
        dense = Anatomy.of(small)
    return dense.model


def _with_windows(model: PreTrainedModel, steps: list[Saving]) -> PreTrainedModel:
    """The model itself where it has no window that is computed under a mask."""
    anatomy = Anatomy.of(model)
    depth = sum(len(stack.layers) for stack in anatomy.stacks)
    count = sum(stack.has_window(index) for stack in anatomy.stacks for index in range(len(stack.layers)))
    if not count or anatomy.block.is_converted():
        return model
    try:
        native = convert_attention(model, "native")
    except UnsupportedModelError:  # a window that counts in another way, or attention of its own
        return model
    told = f"windows: {count} of {depth} layers compute their window as one, and no mask of all tokens by all tokens"
    steps.append(Saving("windows", count, 0, f"{told}."))
    return native


def dead_units(model: PreTrainedModel, group: Group, unmade: bool = True) -> set[int]:
    """Heads or neurons that nothing reads, and with `unmade` those made of zeros alone. One at least is left."""
    if group.has_experts:
        return set()
    dead = torch.ones(group.units, dtype=torch.bool)
    for member in group.members:
        zero = _is_zero(model, member, member.output)
        dead &= zero | _is_unmade(model, member) if unmade else zero
    found = dead.nonzero().flatten().tolist()
    return set(found[1:] if len(found) == group.units else found)


def _is_unmade(model: PreTrainedModel, member: Member) -> torch.Tensor:
    """`[units]`: all rows and biases of the linears that make the unit are zero."""
    names = {part.name.removesuffix("weight") + "bias" for part in member.inputs}
    parts = [*member.inputs, *(part for part in member.others if part.name in names)]
    return torch.stack([_is_zero(model, member, part) for part in parts]).all(0)


def _is_zero(model: PreTrainedModel, member: Member, part: Slice) -> torch.Tensor:
    """`[units]`: whether all numbers that a unit owns there are exactly zero."""
    return ~part.by_unit(model.get_parameter(f"{member.prefix}.{part.name}")).any(1).cpu()


def dead_layers(dense: Anatomy) -> set[tuple[str, int]]:
    """Layers whose outputs to the stream are exactly zero, and that are seen to hand on what they are given."""
    found = {
        (stack.name, index)
        for stack in dense.stacks
        if stack.name in dense.droppable
        for index in range(int(dense.family.first_stays), len(stack.layers))
        if _adds_zero(stack, index)
    }
    found &= _unchanged(dense, found) if found else found
    for stack in dense.stacks:  # one stays
        if all((stack.name, index) in found for index in range(len(stack.layers))):
            found.discard((stack.name, 0))
    return found


def _adds_zero(stack: ModelStack, index: int) -> bool:
    """Whether all that the blocks of a layer write into the stream is zero, biases too."""
    layer = stack.layers[index]
    ffns, attentions = stack.ffns_in(index).values(), stack.attentions_in(index).values()
    paths = [*(attention.output for attention in attentions), *(ffn.down for ffn in ffns if not ffn.has_experts)]
    whole = len(paths) == len(ffns) + len(attentions) > 0
    return whole and all(not weight.any() for path in paths for weight in layer.get_submodule(path).parameters())


def _unchanged(dense: Anatomy, asked: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """Those that hand on random states to the last bit: with a norm after the sum (BERT) they would not."""
    same: set[tuple[str, int]] = set()
    handles = []
    for name, index in asked:

        def note(module: nn.Module, args: tuple, kwargs: dict, output: object, key: tuple = (name, index)) -> None:
            states = output if isinstance(output, torch.Tensor) else output[0]
            if torch.equal(states, states_of(args, kwargs)):
                same.add(key)

        handles.append(dense.stack(name).layers[index].register_forward_hook(note, with_kwargs=True))
    try:
        with evaluating(dense.model):
            dense.model(**_inputs(dense.model))
    finally:
        for handle in handles:
            handle.remove()
    return same


def _inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dummy_inputs(model, 2, min(LENGTH, token_limit(model.config) or LENGTH))


def _difference(model: PreTrainedModel, small: PreTrainedModel) -> float:
    """Of the outputs, as a part of the largest; 0 of a model and itself."""
    if small is model:
        return 0.0
    inputs = _inputs(model)
    with evaluating(model), evaluating(small):
        ours, theirs = outputs_of(small, inputs), outputs_of(model, inputs)
    shares = ((ours[name] - each).abs().max() / each.abs().max().clamp_min(1e-30) for name, each in theirs.items())
    return max(share.item() for share in shares)
