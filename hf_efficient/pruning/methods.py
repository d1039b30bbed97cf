"""The tables of named methods: one entry each, whose code is imported when it is first used.

    IMPORTANCES["taylor"].needs_data                       # imports nothing
    IMPORTANCES["taylor"](model, groups, batches=batches, length=128, seed=0)

`register_importance` adds to `IMPORTANCES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..io.lazy import LazyTable, load
from ..models.family import NEURON_KINDS

# What each granularity of units removes: the kinds of `models.groups.Group`.
UNIT_KINDS = {"head": ("heads", "cross_heads"), "neuron": NEURON_KINDS}
GRANULARITIES = ("head", "neuron", "expert", "layer", "weight")
ALLOCATIONS = ("global", "uniform")


@dataclass(frozen=True)
class Importance:
    """A criterion: its function, or the path of it, and whether that looks at calibration batches."""

    function: Callable[..., Any] | str
    needs_data: bool = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (load(self.function) if isinstance(self.function, str) else self.function)(*args, **kwargs)


# Of units: (model, groups, *, batches, length, seed) -> {group: [units]}.
IMPORTANCES = {
    "fisher": Importance("pruning.score.units:fisher"),
    "taylor": Importance("pruning.score.units:taylor"),
    "obs": Importance("pruning.score.surgeon:obs"),
    "activation": Importance("pruning.score.units:activation"),
    "magnitude": Importance("pruning.score.units:magnitude", needs_data=False),
    "magnitude_l1": Importance("pruning.score.units:magnitude_l1", needs_data=False),
    "random": Importance("pruning.score.units:random", needs_data=False),
}
# Of layers, which all those of units rank too: (anatomy, batches) -> {(stack, layer): score}.
LAYER_IMPORTANCES = {
    "loss": Importance("pruning.score.layers:loss"),
    "block_influence": Importance("pruning.score.layers:block_influence"),
}
# Of the experts of a mixture: (anatomy, mixtures, *, batches, seed) -> {mixture: [experts]}.
EXPERT_IMPORTANCES = {
    "reap": Importance("pruning.score.experts:reap"),
    "frequency": Importance("pruning.score.experts:frequency"),
    "random": Importance("pruning.score.experts:random", needs_data=False),
}
# Of single weights: (model, linears, *, batches, seed) -> {linear: [out, in]}.
WEIGHT_IMPORTANCES = {
    "magnitude": Importance("pruning.score.weights:magnitude", needs_data=False),
    "random": Importance("pruning.score.weights:random", needs_data=False),
    "activation": Importance("pruning.score.weights:activation"),
    "taylor": Importance("pruning.score.weights:taylor"),
    "fisher": Importance("pruning.score.weights:fisher"),
    # It chooses and updates together, so it gives no scores: (model, linears, batches, ratio, structure) -> None.
    "obs": Importance("pruning.fit.sparsegpt:sparsegpt"),
}
# They tell the weights of one matrix apart, by the error in its output, and say nothing about other matrices.
OF_ONE_MATRIX = ("activation", "obs")
# What the gradients of a training run give for free; the last is learned there and nowhere else.
# (score, effect, momentum) -> score, which has taken in one more optimizer step.
TRAINED_IMPORTANCES: LazyTable[Callable[..., Any]] = LazyTable(
    {name: f"pruning.gradual.removal:{name}" for name in ("taylor", "fisher", "movement")}
)
# What a budget counts, for a model of this anatomy and inputs [rows, length]: (anatomy, rows, length) -> Costs.
METRICS: LazyTable[Callable[..., Any]] = LazyTable(
    {
        "macs": "pruning.price.costs:mac_costs",
        "parameters": "pruning.price.costs:parameter_costs",
        "latency": "pruning.price.latency:latency_costs",
    }
)
# While training: progress in [0, 1] -> the fraction of the final ratio that is gone, in [0, 1].
SCHEDULES: dict[str, Callable[[float], float]] = {
    # s_t = s_f (1 - (1 - t)^3), Zhu & Gupta 2017 ("To prune, or not to prune", equation 1) with s_0 = 0.
    "cubic": lambda progress: 1 - (1 - progress) ** 3,
    "linear": lambda progress: progress,
    "one-shot": lambda progress: 1.0 if progress > 0 else 0.0,
}
