"""What to remove from a model, and how to choose it.

PruningConfig(ratio=0.5, granularity=("head", "neuron"), importance="taylor")
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError, unknown_name

# What each granularity of units removes: the kinds of `groups.Group`.
UNIT_KINDS = {"head": ("heads", "cross_heads"), "neuron": ("neurons",)}

METRICS = ("macs", "parameters")
GRANULARITIES = ("head", "neuron", "layer")
IMPORTANCES = ("magnitude", "taylor", "random")
ALLOCATIONS = ("global", "uniform")
SCHEDULES = ("cubic", "linear", "one-shot")


@dataclass(frozen=True)
class PruningConfig:
    """One pruning run.

    Parameters:
        ratio: the fraction of `metric` to remove, between 0 and 1, counted over the layers of the network;
            embeddings and task heads are not counted and not touched.
        metric: `"macs"` (multiply-accumulates at the length of the calibration batches) or `"parameters"`.
        granularity: what may be removed: `"head"` (under grouped-query attention a whole key/value group), `"neuron"`
            (an FFN intermediate unit), `"layer"`. With `"layer"` and another, both reduce the network by the same
            factor: ratio 0.75 keeps half of the layers, and half of what is in them.
        importance: `"taylor"` (|w * dL/dw|, needs calibration batches), `"magnitude"` (L2 norm, the weakest) or
            `"random"` (a control).
        allocation: `"global"` spends the budget over the whole network, `"uniform"` keeps the same number of heads
            and of neurons in every layer, which stock model classes can often load without hf_efficient.
        round_to: every layer keeps a multiple of this many neurons.
        steps: repeat scoring and removing so many times, each on the already pruned model, up to `ratio`.
        schedule: how `PruningCallback` raises the ratio while training: `"cubic"` (Zhu & Gupta 2017), `"linear"`
            or `"one-shot"`.
        seed: for `"random"`.

    Raises:
        ConfigError: a value that is not allowed.
    """

    ratio: float = 0.5
    metric: str = "macs"
    granularity: Sequence[str] = ("head", "neuron")
    importance: str = "taylor"
    allocation: str = "global"
    round_to: int = 8
    steps: int = 1
    schedule: str = "cubic"
    seed: int = 0

    def __post_init__(self) -> None:
        is_number = isinstance(self.ratio, int | float) and not isinstance(self.ratio, bool)
        if not is_number or not 0 < self.ratio < 1:
            raise ConfigError(f"ratio must lie between 0 and 1 (0.5 removes half), both excluded, got {self.ratio!r}.")
        several = isinstance(self.granularity, list | tuple)
        names = tuple(self.granularity) if several else (self.granularity,)
        object.__setattr__(self, "granularity", names)
        if not names:
            raise ConfigError(f"granularity is empty; choose from {', '.join(GRANULARITIES)}.")
        for name in names:
            if name not in GRANULARITIES:
                raise unknown_name("granularity", name, GRANULARITIES)
        for field, known in (
            ("metric", METRICS),
            ("importance", IMPORTANCES),
            ("allocation", ALLOCATIONS),
            ("schedule", SCHEDULES),
        ):
            if getattr(self, field) not in known:
                raise unknown_name(field, getattr(self, field), known)
        for field, high in (("round_to", 4096), ("steps", 1000), ("seed", 2**63 - 1)):
            value, low = getattr(self, field), 0 if field == "seed" else 1
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(f"{field} must be an integer from {low} to {high}, got {value!r}.")

    @property
    def unit_kinds(self) -> tuple[str, ...]:
        """The kinds of units that may leave; empty if only whole layers do."""
        return tuple(kind for name in self.granularity for kind in UNIT_KINDS.get(name, ()))

    @property
    def layer_share(self) -> float:
        """The part of the metric that leaves with whole layers: all of `ratio`, or as large a factor as the units'."""
        if "layer" not in self.granularity:
            return 0.0
        return 1 - (1 - self.ratio) ** 0.5 if self.unit_kinds else self.ratio
