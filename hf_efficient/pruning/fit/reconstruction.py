"""Least squares after surgery: each pruned attention and FFN learns to give the dense output again. No labels.

    small = Anatomy.of(apply_plan(dense, plan))        # dense: the anatomy of the dense model
    reconstruct_blocks(small, dense, batches, token_weights(dense, batches, loss), plan.layers)

Layer by layer, what the output linear of a pruned block reads (x, from the stream that is already pruned and
reconstructed) is fitted to what makes the stream dense again (y), with its weights W:

    minimise over D:   sum over tokens of  c_t || y_t - (W + D) x_t ||^2  +  lambda || D ||^2

y is what the block of the dense model gave, and also what the stream is short of by then: y = (r + block)_dense -
r_pruned, for r the residual that the block is added to. So each block makes up for the errors of those before it too.

D is a change, so lambda pulls to the weights as they are and not to zero; a bias is one more column, not pulled. c_t
is how much the model's answer depends on the block's output at token t: nothing for padding, nothing for tokens that a
classification head never reads. lambda is chosen for each linear on rows that were held out of the fit; where none of
the choices improves the error there, the weights stay as they are. The fit is that of FASP (2025) and, without its
search, ZipLM (2023); that x comes from the pruned stream is from Kwon 2022, section 4.4, which fits one scale for each
unit.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import nn
from transformers import PreTrainedModel

from ...models.anatomy import Anatomy
from ...models.linears import input_dim
from ...models.modes import eval_mode
from ...models.stacks import ModelStack
from ...training.progress import told
from ...training.ranks import gather, meet, share, total
from ..score.finite import check_finite
from ..score.handing import Batch
from ..score.statistics import OutputGradients
from ..score.stream import Block, Stream

LAMBDAS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the mean of the diagonal
HELD_OUT = 5  # one row in five
FLOOR = 0.1  # of the mean weight: what a token counts at least that counts at all

TokenWeights = dict[str, list[torch.Tensor]]  # path of an output linear -> for each batch [B, T]


def reconstruct_blocks(
    small: Anatomy,
    dense: Anatomy,
    batches: Sequence[Batch],
    weights: TokenWeights,
    kept_layers: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Fit the output linears of the small model, in place, to the dense one, of which it is a pruned copy.

    Parameters:
        batches: model inputs.
        weights: c_t above: `token_weights(dense, batches, loss)`.
        kept_layers: which layers of the dense model those of the small one were, stack by stack; by default all.
    """
    with eval_mode(small.model, dense.model), torch.no_grad():
        for stack in small.stacks:
            origin = list((kept_layers or {}).get(stack.name, range(len(stack.layers))))
            name, first = stack.name, dense.stack(stack.name)
            own = share(batches)
            pruned, whole = Stream(small, name, own), Stream(dense, name, own)
            # One layer serves as several (ALBERT): no output fits it at all places.
            if any(meet(len(whole.states) != len(own))):
                continue
            # The dense stream goes through all its layers, the pruned one with it where it has the layer.
            for theirs in told(range(max(origin) + 1), "fit layers"):
                blocks = find_blocks(first, theirs)
                sums = whole.advance(theirs, blocks)
                if theirs not in origin:
                    continue
                mine = origin.index(theirs)
                place = first.layer_prefix(theirs)
                by_path = {path: weights[f"{place}.{path}"] for _, path in blocks}
                fit_layer(pruned, mine, blocks, sums, by_path, place, [getattr(one, "first_row", None) for one in own])
                pruned.advance(mine)


def fit_layer(
    pruned: Stream,
    index: int,
    blocks: Sequence[Block],
    sums: Mapping[str, Iterable[torch.Tensor]],
    weights: Mapping[str, Sequence[torch.Tensor]],
    place: str,
    firsts: Sequence[int | None] | None = None,
) -> None:
    """Fit the blocks of one layer of the pruned stream, in place, one after the other.

    Parameters:
        sums: what the dense stream has behind each block, batch by batch: `Stream.advance`.
        weights: c_t of each block, batch by batch.
        place: what the layer is called in messages.
        firsts: the number of the first row of each batch, where other processes have others.
    """
    for _, path in blocks:
        fit = _Fit(pruned.layers[index].get_submodule(path), f"{place}.{path}")
        read = pruned.inputs(index, blocks, path)
        for n, ((x, residual), y, c) in enumerate(zip(read, sums[path], weights[path], strict=True)):
            fit.add(x, y - residual, c.reshape(x.shape[:-1]), firsts[n] if firsts else None)
        fit.solve()  # before the next block is read, which is to see what this one gives now


class TokenWeighing(OutputGradients):
    """`token_weights` from passes that are made for something else (`statistics.mask_gradients`)."""

    def __init__(self, anatomy: Anatomy):
        paths = [
            f"{stack.layer_prefix(index)}.{path}"
            for stack in anatomy.stacks
            for index in range(len(stack.layers))
            for _, path in find_blocks(stack, index)
        ]
        super().__init__({path: anatomy.model.get_submodule(path) for path in paths})
        self.squares: TokenWeights = {path: [] for path in paths}

    def take(self, gradients: Iterable[torch.Tensor | None]) -> None:
        super().take(gradients)
        last = {path: gradient for path, _, gradient in self.calls}  # of a module that serves as several (ALBERT)
        for path, gradient in last.items():
            self.squares[path].append(gradient.float().square().sum(-1))
        self.calls = []  # what they read is not needed

    def weights(self, own: Sequence[Batch]) -> TokenWeights:
        """`own`: the batches of this process, in the order in which they came."""
        for path, by_batch in self.squares.items():
            for weight in by_batch:
                check_finite(weight, f"How much the answer depends on {path}")
        numbers = [getattr(batch, "number", place) for place, batch in enumerate(own)]
        return {path: with_floor(by_batch, gather(by_batch, numbers)) for path, by_batch in self.squares.items()}


def token_weights(
    anatomy: Anatomy, batches: Sequence[Batch], loss: Callable[[PreTrainedModel, Batch], torch.Tensor]
) -> TokenWeights:
    """How much the answer depends on what each block gives at each token: || d loss / d y_t ||^2, its mean made 1.

    `loss(model, batch)` is a scalar summed over the rows of a batch. Of several processes each has its own batches.
    """
    weighing, own = TokenWeighing(anatomy), share(batches)
    with eval_mode(anatomy.model):
        for batch in own:
            with ExitStack() as hooks, torch.enable_grad():
                weighing.watch(hooks)
                scalar = loss(anatomy.model, batch)
            weighing.take(torch.autograd.grad(scalar, weighing.offsets, allow_unused=True))
    return weighing.weights(own)


def with_floor(weights: list[torch.Tensor], everywhere: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """The weights of one block over their mean, those above zero lifted to `FLOOR` at least.

    `everywhere`: those of all processes, whose mean counts.
    """
    counted = torch.cat([weight[weight > 0] for weight in (weights if everywhere is None else everywhere)])
    mean = counted.mean() if len(counted) else torch.ones(())
    return [torch.where(weight > 0, (1 - FLOOR) * weight / mean.to(weight) + FLOOR, 0.0) for weight in weights]


def find_blocks(stack: ModelStack, index: int) -> list[Block]:
    """The blocks of a layer that can be fitted, in the order in which they run; experts and FFNs beside the first
    cannot."""
    attentions = (attention for attention in stack.attentions_in(index).values() if attention.query)
    blocks = [Block(attention.query, attention.output) for attention in attentions]
    ffn = stack.ffns_in(index).get("neurons")
    return [*blocks, Block(ffn.up[0], ffn.down)] if ffn else blocks


class _Fit:
    """The normal equations of one linear, those of held-out rows apart: sums of c x x' and of c x y'."""

    def __init__(self, linear: nn.Module, name: str = "a linear"):
        self.name, self.linear, self.bias = name, linear, linear.bias is not None
        self.rows = 0
        self.sums: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, x: torch.Tensor, y: torch.Tensor, c: torch.Tensor, first: int | None = None) -> None:
        """x [B, T, in], y [B, T, out], c [B, T]. Products in at least float32, sums in float64.

        `first`: the number of the first row among those of all processes; default: of those here.
        """
        first = self.rows if first is None else first
        held_out = torch.arange(first, first + len(x), device=x.device) % HELD_OUT == HELD_OUT - 1
        self.rows += len(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.bias:
            x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        for apart in (False, True):
            rows = held_out == apart
            own, target = (tensor[rows].flatten(0, -2).to(dtype) for tensor in (x, y))
            weighted = (own * c[rows].flatten()[:, None].to(dtype)).T
            products = (weighted @ one for one in (own, target))  # one at a time: they may be large
            if apart in self.sums:
                for whole, more in zip(self.sums[apart], products, strict=True):
                    whole += more
            else:
                gram, moment = (one.double() for one in products)
                self.sums[apart] = (gram, moment)

    def solve(self) -> None:
        """Change the weights by the best D that improves the held-out error, if any; DataError for sums not finite."""
        if sum(meet(self.rows)) < HELD_OUT:
            return  # nothing to choose lambda on
        places = [(apart, part) for apart in (False, True) for part in (0, 1)]
        own = {(apart, part): self.sums[apart][part] for apart, part in places if apart in self.sums}
        sums = total(own, places)
        for one in sums.values():
            check_finite(one, f"What {self.name} reads and is fitted to in reconstruction")
        weight = self._weight()
        fit, held = ((sums[apart, 0], sums[apart, 1] - sums[apart, 0] @ weight) for apart in (False, True))
        self.sums.clear()  # of a wide FFN these matrices are most of the memory that a fit takes
        del weight, own, sums, one
        errors = {0.0: 0.0}  # of no change
        for size in LAMBDAS:
            change = self._ridge(*fit, size)
            errors[size] = float((change * (held[0] @ change)).sum() - 2 * (change * held[1]).sum())
        best = min(errors, key=errors.__getitem__)
        if best:
            for whole, rest in zip(fit, held, strict=True):
                whole += rest
            self._change(self._ridge(*fit, best))
            check_finite(self.linear.weight, f"The reconstructed weight of {self.name}")

    def _weight(self) -> torch.Tensor:
        """W' and b as one matrix [in + bias, out]."""
        weight = self.linear.weight if input_dim(self.linear) == 0 else self.linear.weight.T
        return (torch.cat([weight, self.linear.bias[None]]) if self.bias else weight).double()

    def _change(self, change: torch.Tensor) -> None:
        weight = self.linear.weight
        inputs = len(change) - self.bias
        weight += (change[:inputs] if input_dim(self.linear) == 0 else change[:inputs].T).to(weight.dtype)
        if self.bias:
            self.linear.bias += change[inputs].to(weight.dtype)

    def _ridge(self, gram: torch.Tensor, moment: torch.Tensor, size: float) -> torch.Tensor:
        inputs = len(gram) - self.bias
        pull = size * gram.diagonal()[:inputs].mean()
        damped = gram.clone()
        damped.diagonal()[:inputs] += pull
        if self.bias:
            damped[inputs, inputs] *= 1 + 1e-6
        damped.diagonal().clamp_(min=torch.finfo(gram.dtype).tiny)  # an input that is always zero
        return torch.cholesky_solve(moment, torch.linalg.cholesky(damped))
