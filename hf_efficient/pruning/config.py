"""What to remove from a model, and how to choose it.

PruningConfig(ratio=0.5)                                         # heads and neurons, by Fisher information
PruningConfig(ratio=0.5, metric="latency", sequence_length=128)  # twice as fast
PruningConfig(granularity="weight", mask_structure="2:4", importance="obs")
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import ConfigError, shown, unknown_name
from .methods import (
    ALLOCATIONS,
    EXPERT_IMPORTANCES,
    GRANULARITIES,
    IMPORTANCES,
    LAYER_IMPORTANCES,
    METRICS,
    SCHEDULES,
    UNIT_KINDS,
    WEIGHT_IMPORTANCES,
)
from .pattern import Pattern, check_weight_importance

LIMITS = {
    "round_to": 4096,
    "steps": 1000,
    "sequence_length": 1 << 24,
    "latency_batch_size": 1 << 16,
    "seed": 2**63 - 1,
}

_DEFAULT: Any = None  # not given: depends on other fields, as the docstring says


@dataclass(frozen=True)
class PruningConfig:
    """One pruning run.

    Parameters:
        ratio: the fraction of `metric` to remove, between 0 and 1, counted over the layers of the network;
            embeddings and task heads are not counted and not touched. Of `"weight"` alone it is the fraction of the
            linears' weights that become zero. Default 0.5; with `mask_structure` what that says.
        metric: `"macs"` (multiply-accumulates on `sequence_length` tokens; the default), `"parameters"` (the default
            and all that there is where experts leave, since as many work for a token as before), or `"latency"`: the
            time of one forward of the whole model, measured on this machine for `latency_batch_size` x
            `sequence_length` tokens, so that 0.5 makes it twice as fast.
        granularity: what may be removed: `"head"` (under grouped-query attention a whole key/value group), `"neuron"`
            (an FFN intermediate unit), `"expert"` (of a mixture, as many in every layer), `"layer"`, `"weight"` (zeros
            in the linears, which keep their size). Layers, experts, units (heads and neurons) and weights all reduce
            the network by the same factor: ratio 0.75 keeps half of the layers, and half of what is in them. Weights
            come last, of what the others have left.
        importance: `"fisher"` (the default), `"taylor"`, `"obs"` (of weights SparseGPT), `"activation"`,
            `"magnitude"`, `"magnitude_l1"` or `"random"`; see `pruning.score.units`. `"movement"` is learned while
            training (`PruningCallback`). Of layers alone `"loss"` (their default), `"block_influence"`, or one of the
            above, summed over a layer's units.
        layer_importance: of layers, where units leave too; default `"loss"`.
        expert_importance: of experts: `"reap"` (the default), `"frequency"` or `"random"`; see
            `pruning.score.experts`. Of experts alone `importance` says the same.
        rearrange: with `"fisher"`, choose units of a group together (Kwon 2022, section 4.3), and not one by one.
        allocation: `"global"` spends the budget over the whole network (but for experts, of which a stock config knows
            one number), `"uniform"` keeps the same number of heads and of neurons in every layer, which stock model
            classes can often load without hf_efficient; the same fraction of weights in every matrix (`"activation"`:
            in every output row).
        mask_structure: a pattern of zeros: `"2:4"` keeps 2 of every 4 consecutive inputs in every row. None: anywhere.
        reconstruct: with calibration batches, what stays makes up for what leaves: least squares on the output linears
            (`pruning.fit.reconstruction`), for weights the update of SparseGPT.
        round_to: every layer keeps a multiple of this many neurons.
        steps: score and remove in so many steps, each on the model as it is by then, up to `ratio`.
        sequence_length: tokens of the inputs that the model is made for. Default: the average of the calibration
            batches, or 128, or all that the model takes if that is less.
        latency_batch_size: rows of the inputs for `metric="latency"`.
        schedule: how `PruningCallback` raises the ratio while training: `"cubic"` (Zhu & Gupta 2017), `"linear"`
            or `"one-shot"`.
        seed: of whatever is drawn.

    Raises:
        ConfigError: a value that is not allowed.
    """

    ratio: float = _DEFAULT
    metric: str = _DEFAULT
    granularity: Sequence[str] = ("head", "neuron")
    importance: str = _DEFAULT
    layer_importance: str = _DEFAULT
    expert_importance: str = _DEFAULT
    rearrange: bool = False
    allocation: str = "global"
    mask_structure: str | None = None
    reconstruct: bool = True
    round_to: int = 8
    steps: int = 1
    sequence_length: int | None = None
    latency_batch_size: int = 8
    schedule: str = "cubic"
    seed: int = 0

    def __post_init__(self) -> None:
        structure = self.structure
        if self.ratio is None:
            object.__setattr__(self, "ratio", 0.5 if structure is None else structure.zeros)
        several = isinstance(self.granularity, list | tuple)
        object.__setattr__(self, "granularity", tuple(self.granularity) if several else (self.granularity,))
        if self.metric is None:
            object.__setattr__(self, "metric", "parameters" if "expert" in self.granularity else "macs")
        self._check_values()
        self._check_importance()
        self._check_weights()

    def _check_values(self) -> None:
        is_number = isinstance(self.ratio, int | float) and not isinstance(self.ratio, bool)
        if not is_number or not 0 < self.ratio < 1:
            raise ConfigError(
                f"ratio must lie between 0 and 1 (0.5 removes half), both excluded, got {shown(self.ratio)}."
            )
        if not self.granularity:
            raise ConfigError(f"granularity is empty; choose from {', '.join(GRANULARITIES)}.")
        for name in self.granularity:
            if name == "vocabulary":
                raise ConfigError(
                    "The vocabulary leaves together with the tokenizer, after everything else: model, tokenizer = "
                    "prune_vocabulary(model, tokenizer, texts); in a recipe the last stage `vocabulary: {}`."
                )
            if name not in GRANULARITIES:
                raise unknown_name("granularity", name, GRANULARITIES)
        for field, known in (("metric", METRICS), ("allocation", ALLOCATIONS), ("schedule", SCHEDULES)):
            if getattr(self, field) not in tuple(known):  # a value need not be hashable
                raise unknown_name(field, getattr(self, field), known)
        if "expert" in self.granularity and self.metric != "parameters":
            raise ConfigError(
                f"metric={self.metric!r} does not fall when experts leave: as many work for a token as before. With "
                "'expert' in granularity ratio is a fraction of the parameters: set metric='parameters', or leave it "
                "out."
            )
        for field, high in LIMITS.items():
            value, low = getattr(self, field), 0 if field == "seed" else 1
            if field == "sequence_length" and value is None:
                continue
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(f"{field} must be an integer from {low} to {high}, got {shown(value)}.")
        for field in ("reconstruct", "rearrange"):
            if type(getattr(self, field)) is not bool:
                raise ConfigError(f"{field} must be true or false, got {shown(getattr(self, field))}.")

    def _check_importance(self) -> None:
        for field in ("importance", "layer_importance", "expert_importance"):
            value = getattr(self, field)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{field} must be a name, got {shown(value)}.")
        ranked = {"layer": "layer_importance", "expert": "expert_importance"}
        alone = ranked.get(self.granularity[0]) if len(self.granularity) == 1 else None
        if alone:  # then both say the same
            default = {"layer_importance": "loss", "expert_importance": "reap"}[alone]
            object.__setattr__(self, "importance", self.importance or getattr(self, alone) or default)
            object.__setattr__(self, alone, self.importance)
        for field, default in (("importance", "fisher"), ("layer_importance", "loss"), ("expert_importance", "reap")):
            if getattr(self, field) is None:
                object.__setattr__(self, field, default)
        self._check_names(alone)

    def _check_names(self, alone: str | None) -> None:
        of_layers = [*LAYER_IMPORTANCES, *IMPORTANCES]
        if alone:
            known = of_layers if alone == "layer_importance" else [*EXPERT_IMPORTANCES]
        elif self.importance in LAYER_IMPORTANCES:
            raise ConfigError(
                f"importance={self.importance!r} ranks layers, granularity is {list(self.granularity)}. Set "
                f"layer_importance={self.importance!r} for the layers, and importance for what is in them."
            )
        elif self.importance in EXPERT_IMPORTANCES and self.importance not in IMPORTANCES:
            raise ConfigError(
                f"importance={self.importance!r} ranks experts, granularity is {list(self.granularity)}. Set "
                f"expert_importance={self.importance!r} for the experts, and importance for what else leaves."
            )
        else:
            known = [name for name in WEIGHT_IMPORTANCES if "weight" in self.granularity]
            if self.unit_kinds or not known:  # that of units, which experts and layers do not ask for
                known = [name for name in IMPORTANCES if not known or name in known]
            known = [*known, "movement"]
        if self.importance not in known:
            raise unknown_name(f"importance of granularity {list(self.granularity)}:", self.importance, known)
        if self.rearrange and (self.importance != "fisher" or not self.unit_kinds):
            raise ConfigError(
                f"rearrange needs importance='fisher' of heads or neurons, got importance={self.importance!r} of "
                f"{list(self.granularity)}."
            )
        if self.layer_importance not in of_layers:
            raise unknown_name("layer_importance", self.layer_importance, of_layers)
        if self.expert_importance not in EXPERT_IMPORTANCES:
            raise unknown_name("expert_importance", self.expert_importance, EXPERT_IMPORTANCES)

    def _check_weights(self) -> None:
        if "weight" not in self.granularity:
            if self.mask_structure is not None:
                raise ConfigError(
                    f"mask_structure={self.mask_structure!r} is a pattern of zero weights; granularity is "
                    f"{list(self.granularity)}. Add 'weight' to it, or leave mask_structure out."
                )
            return
        across_matrices = self.structure is None and self.allocation == "global"
        check_weight_importance(self.importance, self.reconstruct, across_matrices)
        if self.structure is not None:
            self.structure.check(self.ratio, self._rest, self.steps, self.round_to)

    @property
    def structure(self) -> Pattern | None:
        """`mask_structure` in numbers: (2, 4)."""
        return None if self.mask_structure is None else Pattern.read(self.mask_structure)

    @property
    def _rest(self) -> tuple[str, ...]:
        return tuple(name for name in self.granularity if name != "weight")

    @property
    def weight_ratio(self) -> float:
        """The fraction of weights that become zero: `ratio`, or the factor that layers and units reduce by too."""
        if "weight" not in self.granularity:
            return 0.0
        if self.structure is not None:
            return self.structure.zeros
        return 1 - (1 - self.ratio) ** (1 / (1 + self._parts))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        values = asdict(self) | {"granularity": list(self.granularity)}
        if "expert" not in self.granularity:
            del values["expert_importance"]
        return values

    def without_weights(self) -> "PruningConfig | None":
        """What is left to do for layers and units; None if nothing."""
        if not self._rest:
            return None
        ratio = 1 - (1 - self.ratio) / (1 - self.weight_ratio)
        alone = {"layer": self.layer_importance, "expert": self.expert_importance}
        importance = alone.get(self._rest[0], self.importance) if len(self._rest) == 1 else self.importance
        return replace(self, granularity=self._rest, ratio=ratio, mask_structure=None, importance=importance)

    @property
    def unit_kinds(self) -> tuple[str, ...]:
        """The kinds of units that may leave; empty if only whole layers do."""
        return tuple(kind for name in self.granularity for kind in UNIT_KINDS.get(name, ()))

    @property
    def _parts(self) -> int:
        """How many of layers, experts and units leave, each of which reduces by the same factor."""
        return ("layer" in self.granularity) + ("expert" in self.granularity) + bool(self.unit_kinds)

    @property
    def layer_share(self) -> float:
        """The part of the metric that leaves with whole layers: all of `ratio`, or as large a factor as of others."""
        return 1 - (1 - self.ratio) ** (1 / self._parts) if "layer" in self.granularity else 0.0
