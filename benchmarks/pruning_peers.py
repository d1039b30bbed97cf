"""Structured pruning of a BERT classifier by others, for `pruning.py`: torch-pruning, and Kwon 2022 from the paper.

    small = torch_pruning("taylor")(model, 0.5, Calibration(batches, length), seed=0)
    evaluate(small.model), small.macs, small.parameters

Both get the fine-tuned model, the calibration batches and the MACs that all others get, and the labels too. Neither
trains. Both prune heads and neurons (FFN intermediate units) over the whole network, one at a time, without rounding.

**torch-pruning** (Fang 2023, DepGraph): its own graph, importances and pruner, with the defaults of both, one-shot;
the residual stream is left alone as in its examples for transformers. It takes a ratio of units, the same for heads
and for neurons, so that is searched by bisection.

**kwon**: "A Fast Post-Training Pruning Framework for Transformers" (Kwon 2022, section 4): mask search,
mask rearrangement and mask tuning, for masks on heads and neurons. The result is the dense model with masks. Where the
paper leaves something open it is as in the authors' program (github.com/WoosukKwon/retraining-free-pruning), but for
one number that theirs fits with the scales of an attention (a constant in all outputs) and throws away.
"""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from scipy.sparse.linalg import lsmr
from torch import nn
from transformers import PreTrainedModel

from hf_efficient.models.anatomy import Anatomy
from hf_efficient.pruning.price.costs import make_costs, total_cost

Batch = dict[str, torch.Tensor]
Masks = list[torch.Tensor]  # one of every layer, in order: `[heads]` or `[neurons]`


class OutOfReach(ValueError):
    """The peer cannot remove as much as it is asked for."""


@dataclass(frozen=True)
class Calibration:
    """Labelled batches, and the number of tokens at which MACs are counted."""

    batches: list[Batch]
    length: int

    def without_labels(self) -> list[Batch]:
        return [{key: value for key, value in batch.items() if key != "labels"} for batch in self.batches]


@dataclass(frozen=True)
class Pruned:
    """A model that can be evaluated, and what it would cost with the masked units gone."""

    model: nn.Module
    macs: float
    parameters: int


Peer = Callable[[PreTrainedModel, float, Calibration, int], Pruned]


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def torch_pruning(importance: str) -> Peer:
    """Importance `"taylor"` (first order, of the labelled loss) or `"l2"` (magnitude)."""

    def run(model: PreTrainedModel, ratio: float, calibration: Calibration, seed: int) -> Pruned:
        gradients = _gradients(model, calibration.batches) if importance == "taylor" else {}
        dense = total_cost(model, "macs", calibration.length)
        low, high, best = 0.0, 1.0, None
        for _ in range(12):
            middle = (low + high) / 2
            small = _torch_pruned(model, gradients, importance, middle)
            macs = total_cost(small, "macs", calibration.length)
            if macs <= (1 - ratio) * dense:
                high, best = middle, Pruned(small, macs, count_parameters(small))
            else:
                low = middle
        if best is None:
            raise OutOfReach(f"torch-pruning keeps more than that, here {macs / dense:.0%} of the MACs.")
        return best

    return run


def _gradients(model: PreTrainedModel, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Of the loss, summed over batches."""
    model = copy.deepcopy(model).eval()
    for batch in batches:
        model(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _torch_pruned(
    model: PreTrainedModel, gradients: dict[str, torch.Tensor], importance: str, ratio: float
) -> PreTrainedModel:
    """This fraction of the heads and of the neurons gone."""
    try:
        import torch_pruning as tp
    except ImportError as error:
        raise SystemExit(
            "This peer is torch-pruning: pip install --no-deps torch-pruning==1.6.1 (or leave it out: --methods)."
        ) from error
    small = copy.deepcopy(model).eval().requires_grad_(True)
    for name, parameter in small.named_parameters():
        parameter.grad = gradients.get(name)
    layers = small.base_model.encoder.layer
    heads = small.config.num_attention_heads
    attentions = [layer.attention.self for layer in layers]
    stream = [small.base_model.embeddings, small.base_model.pooler, small.classifier]  # what makes or reads it
    stream += [part for layer in layers for part in (layer.attention.output, layer.output)]
    pruner = tp.pruner.BasePruner(
        small,
        {"input_ids": torch.arange(1, 17)[None], "attention_mask": torch.ones(1, 16, dtype=torch.long)},
        importance={"taylor": tp.importance.GroupTaylorImportance, "l2": tp.importance.GroupMagnitudeImportance}[
            importance
        ](),
        global_pruning=True,
        pruning_ratio=ratio,
        head_pruning_ratio=ratio,
        num_heads={linear: heads for own in attentions for linear in (own.query, own.key, own.value)},
        out_channel_groups={},  # the default is one dict for all calls, and grows
        in_channel_groups={},
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=stream,
        output_transform=lambda output: output.logits.sum(),
    )
    pruner.step()
    for own in attentions:
        own.num_attention_heads = own.query.out_features // own.attention_head_size
        own.all_head_size = own.query.out_features
    small.zero_grad(set_to_none=True)
    return small


DAMP = 1.0  # of LSMR
LARGEST = 10.0  # a scale beyond this ends the tuning


def kwon(model: PreTrainedModel, ratio: float, calibration: Calibration, seed: int) -> Pruned:
    """Search, rearrangement and tuning."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    costs = make_costs(Anatomy.of(model), "macs", calibration.length)
    groups = {group.kind: group for group in Anatomy.of(model).groups}
    head_cost, neuron_cost = costs.of(groups["heads"], 1), costs.of(groups["neurons"], 1)
    head_gradients, neuron_gradients = _mask_gradients(model, calibration.batches)
    squares = [[own.square().sum(0) for own in gradients] for gradients in (head_gradients, neuron_gradients)]

    def search(constraint: float) -> tuple[Masks, Masks]:
        return search_masks(*squares, head_cost, neuron_cost, constraint * costs.total)

    constraint = 1 - ratio
    teacher = search(constraint**0.5)  # half way, so that what is fitted to is not too far away
    heads, neurons = search(constraint)
    heads = [rearrange_mask(mask, own) for mask, own in zip(heads, head_gradients, strict=True)]
    neurons = [rearrange_mask(mask, own) for mask, own in zip(neurons, neuron_gradients, strict=True)]
    left_heads, left_neurons = (int(sum(mask.sum() for mask in masks)) for masks in (heads, neurons))
    student = _tune(model, calibration.batches, teacher, (heads, neurons))
    return Pruned(
        _with_masks(model, student),
        left_heads * head_cost + left_neurons * neuron_cost,
        count_parameters(model) - _parameters_gone(model, left_heads, left_neurons),
    )


def _parameters_gone(model: PreTrainedModel, heads: int, neurons: int) -> int:
    """With so many left in all layers; a head owns rows of three linears with their biases, and columns of one."""
    config = model.config
    width, hidden = config.hidden_size // config.num_attention_heads, config.hidden_size
    gone_heads = config.num_hidden_layers * config.num_attention_heads - heads
    gone_neurons = config.num_hidden_layers * config.intermediate_size - neurons
    return gone_heads * width * (4 * hidden + 3) + gone_neurons * (2 * hidden + 1)


def search_masks(
    head_scores: Masks, neuron_scores: Masks, head_cost: float, neuron_cost: float, budget: float
) -> tuple[Masks, Masks]:
    """Masks that keep the largest total score within the budget.

    With the off-diagonal of the Fisher matrix left out, the increase of the loss is the sum of the scores of what is
    masked. For every number of heads the best ones are kept, and as many of the best neurons as the rest
    of the budget pays for.
    """
    heads, neurons = torch.cat(head_scores), torch.cat(neuron_scores)
    by_rank = [scores.sort(descending=True) for scores in (heads, neurons)]
    gains = [torch.cat([torch.zeros(1), rank.values.cumsum(0)]) for rank in by_rank]
    best = (-1.0, 0, 0)
    for count in range(1, len(heads) + 1):
        rest = budget - count * head_cost
        if rest < 0:
            break
        others = min(int(rest // neuron_cost), len(neurons))
        best = max(best, (float(gains[0][count] + gains[1][others]), count, others))
    masks = []
    for rank, count, scores in zip(by_rank, best[1:], (head_scores, neuron_scores), strict=True):
        mask = torch.zeros(len(rank.indices))
        mask[rank.indices[:count]] = 1
        masks.append(list(mask.split([len(own) for own in scores])))
    return masks[0], masks[1]


def rearrange_mask(mask: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """As many ones, chosen with the layer's block of the Fisher matrix in view (greedy).

    `gradients` are `[mini-batches, units]`. Masking the set P raises the loss by the squared norm of the sum of the
    gradients of P. Start with the lowest scores; add each other unit, and let the one go without which that is least.
    """
    gone = int((mask == 0).sum())
    if gone in (0, len(mask)):
        return mask
    vectors = gradients.T  # [units, mini-batches]
    order = vectors.square().sum(1).argsort().tolist()
    masked = order[:gone]
    for unit in order[gone:]:
        masked.append(unit)
        own = vectors[masked]
        without = own.sum(0) - own
        del masked[int(without.square().sum(1).argmin())]
    new = torch.ones_like(mask)
    new[masked] = 0
    return new


def solve_scales(gram: torch.Tensor, moment: torch.Tensor) -> torch.Tensor | None:
    """Scales near 1 that solve the normal equations (LSMR, damped); None if one is too large."""
    change = lsmr(gram.numpy(), (moment - gram.sum(1)).numpy(), damp=DAMP)[0]
    scales = torch.from_numpy(change).float() + 1
    return None if float(scales.abs().max()) > LARGEST else scales


def _outputs(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The blocks that end in a linear and a layer norm: of the attention, of the FFN."""
    return layer.attention.output, layer.output


def _multiply(mask: torch.Tensor) -> Callable:
    def hook(linear: nn.Linear, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0] * mask.repeat_interleave(args[0].shape[-1] // len(mask)),)

    return hook


def _with_masks(model: PreTrainedModel, masks: tuple[Masks, Masks]) -> PreTrainedModel:
    """The model itself, with hooks that stay."""
    for layer, *own in zip(model.base_model.encoder.layer, *masks, strict=True):
        for block, mask in zip(_outputs(layer), own, strict=True):
            block.dense.register_forward_pre_hook(_multiply(mask))
    return model


def _mask_gradients(model: PreTrainedModel, batches: list[Batch]) -> tuple[Masks, Masks]:
    """`[mini-batches, units]` for each layer: of the mean loss of a mini-batch, at masks of ones."""
    layers, config = model.base_model.encoder.layer, model.config
    sizes = (config.num_attention_heads, config.intermediate_size)
    masks = [torch.ones(size, requires_grad=True) for _ in layers for size in sizes]
    linears = [block.dense for layer in layers for block in _outputs(layer)]
    handles = [linear.register_forward_pre_hook(_multiply(mask)) for linear, mask in zip(linears, masks, strict=True)]
    rows = [torch.autograd.grad(model(**batch).loss, masks) for batch in batches]
    for handle in handles:
        handle.remove()
    stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
    return stacked[0::2], stacked[1::2]


@dataclass(frozen=True)
class _Seen:
    """Of one block: the `units` that its linear read, the `residual`, and the `summed` before the norm."""

    units: torch.Tensor
    residual: torch.Tensor
    summed: torch.Tensor


class _Stream:
    """The hidden states before one layer, of all batches, and how a layer is called on each."""

    def __init__(self, model: PreTrainedModel, batches: list[Batch]):
        self.layers = model.base_model.encoder.layer
        self.states: list[torch.Tensor] = []
        self.calls: list[tuple[tuple, dict]] = []
        handle = self.layers[0].register_forward_pre_hook(self._record, with_kwargs=True)
        for batch in batches:
            model(**batch)
        handle.remove()

    def _record(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        self.states.append(args[0])
        self.calls.append((args[1:], kwargs))

    def run(self, index: int, number: int, masks: tuple[Masks, Masks]) -> tuple[torch.Tensor, list[_Seen]]:
        """One masked layer on one batch: what it gives, and what its two blocks saw."""
        layer, seen = self.layers[index], []
        with ExitStack() as hooks:
            for block, own in zip(_outputs(layer), masks, strict=True):
                for module, hook in (
                    (block.dense, _multiply(own[index])),
                    (block, lambda module, args: seen.append(args[1])),
                    (block.dense, lambda module, args: seen.append(args[0])),
                    (block.LayerNorm, lambda module, args: seen.append(args[0])),
                ):
                    hooks.callback(module.register_forward_pre_hook(hook).remove)
            args, kwargs = self.calls[number]
            output = layer(self.states[number], *args, **kwargs)
        blocks = [_Seen(units, residual, summed) for residual, units, summed in (seen[:3], seen[3:])]
        return output[0] if isinstance(output, tuple) else output, blocks

    def advance(self, index: int, masks: tuple[Masks, Masks]) -> list[list[_Seen]]:
        """Through one layer with all batches."""
        results = [self.run(index, number, masks) for number in range(len(self.states))]
        self.states = [output for output, _ in results]
        return [blocks for _, blocks in results]


@torch.no_grad()
def _tune(
    model: PreTrainedModel, batches: list[Batch], teacher: tuple[Masks, Masks], student: tuple[Masks, Masks]
) -> tuple[Masks, Masks]:
    """Scales in place of the student's ones, layer by layer: || x + f(x; m) - (x' + f(x'; m')) ||^2 is
    made small over real tokens, x from the student as tuned so far, x' and m' from the teacher."""
    student = ([mask.clone() for mask in student[0]], [mask.clone() for mask in student[1]])
    mine, theirs = _Stream(model, batches), _Stream(model, batches)
    last = len(mine.layers) - 1
    for index, layer in enumerate(mine.layers):
        targets = theirs.advance(index, teacher)
        for kind, block in enumerate(_outputs(layer)):
            mask = student[kind][index]
            if not mask.any() or (kind == 0 and index == 0):  # the first attention is skipped, as in their program
                continue
            gram, moment = 0.0, 0.0
            for number, batch in enumerate(batches):
                real = batch["attention_mask"].bool()
                if kind == 1 and index == last:  # the classifier reads the first token alone
                    real = torch.zeros_like(real)
                    real[:, 0] = True
                seen = mine.run(index, number, student)[1][kind]
                goal = targets[number][kind].summed - seen.residual - block.dense.bias
                found = normal_equations(seen.units[real], goal[real], block.dense.weight, mask)
                gram, moment = gram + found[0], moment + found[1]
            scales = solve_scales(gram, moment)
            if scales is None:
                return student
            mask[mask > 0] = scales
        mine.advance(index, student)
    return student


def normal_equations(
    units: torch.Tensor, goal: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A'A and A'b of || A m - b ||^2 for the units that are kept, A's columns what each adds to the output.

    units [tokens, units x width], goal [tokens, out], weight [out, units x width].
    """
    kept, width = mask > 0, units.shape[1] // len(mask)
    columns = kept.repeat_interleave(width)
    x, w = units[:, columns], weight[:, columns]
    gram = (x.T @ x).double() * (w.T @ w).double()  # [units x width]^2; summed over what a unit owns it is A'A
    count = int(kept.sum())
    gram = gram.view(count, width, count, width).sum((1, 3))
    moment = (x * (goal @ w)).double().sum(0).view(count, width).sum(1)
    return gram, moment


PEERS: dict[str, Peer] = {
    "torch-pruning taylor": torch_pruning("taylor"),
    "torch-pruning l2": torch_pruning("l2"),
    "kwon 2022": kwon,
}
