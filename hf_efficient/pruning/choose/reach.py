"""Can this ratio be reached at all? Answered from shapes alone, before any data is read or any weight is touched."""

from ...errors import ConfigError, UnsupportedModelError
from ...models.anatomy import Anatomy
from ...models.family import EXPERTS, HEADS, LAYERS, NEURONS
from ...models.groups import Group
from ..config import PruningConfig
from ..plan import PruningPlan
from ..price.costs import Costs
from .allocation import allocate_alike, choose_layers, fewest
from .sparsity import check_structure

NEAR = 0.9  # of what prices say can be reached: from there on it is measured


# What granularity calls it -> the ability.
PARTS = {"head": HEADS, "neuron": NEURONS, "expert": EXPERTS, "layer": LAYERS}


def check_abilities(anatomy: Anatomy, config: PruningConfig) -> None:
    """Refuse to remove what cannot be removed from this architecture, and say why."""
    possible = [part for part, ability in PARTS.items() if anatomy.family.why_not(ability) is None]
    for part in config.granularity:
        if part in PARTS and part not in possible:
            others = f"granularity={tuple(possible)}" if possible else "another model"
            raise UnsupportedModelError(
                f"The {PARTS[part]} of {anatomy.family.model_type} models cannot be removed: "
                f"{anatomy.family.why_not(PARTS[part])}. Choose {others}."
            )


def check_reachable(anatomy: Anatomy, config: PruningConfig, costs: Costs) -> None:
    """Compare what is asked for with what the architecture can lose, and the budget with the least that must stay: one
    head in each attention, `round_to` neurons in each FFN.

    Any fraction of the weights can become zero, but their pattern has to fit. The model may be on the meta device.

    Raises:
        ConfigError: the ratio is too high (the message names the highest that can be reached), or a pattern of zeros
            does not fit.
        UnsupportedModelError: heads, neurons or layers cannot be removed from this architecture.
    """
    check_abilities(anatomy, config)
    if "weight" in config.granularity:
        check_structure(anatomy, config)
        if (rest := config.without_weights()) is not None:
            check_reachable(anatomy, rest, costs)
        return
    groups = [group for group in anatomy.groups if group.kind in config.unit_kinds]
    whole, least = costs.layers, _least(groups, config, costs)
    kept: dict[str, tuple[int, ...]] = {}
    if "layer" in config.granularity:
        alone = tuple(config.granularity) == ("layer",)
        share, family = 1.0 if alone else config.layer_share, anatomy.family
        scores = {key: cost for key, cost in whole.items() if key[0] in anatomy.droppable}
        kept = choose_layers(scores, whole, share * costs.total, False, family.deepest, family.first_stays)
        least = {(stack, layer): least[stack, layer] for stack, layers in kept.items() for layer in layers}
    outside = costs.total - sum(whole.values())  # of a measured latency: embeddings and head
    highest = 1 - (sum(least.values()) + outside) / costs.total
    if costs.measure is not None and config.ratio > NEAR * highest:
        units = {g.name: tuple(range(fewest(g, config))) for g in groups}
        highest = 1 - costs.measure(PruningPlan(layers=kept, units=units)) / costs.total
    if config.ratio > highest and costs.measure is not None:
        raise ConfigError(
            f"ratio={config.ratio} asks for a model that is {1 / (1 - config.ratio):.2f} times as fast. With "
            f"granularity={list(config.granularity)} and round_to={config.round_to} a speed-up of at most "
            f"{1 / (1 - highest):.2f} (ratio {highest:.2f}) can be reached on this machine: every layer keeps at "
            "least one head and `round_to` neurons, every stack one layer, and embeddings and head stay. Lower "
            "`ratio` or `round_to`, or add to `granularity`."
        )
    if config.ratio > highest:
        experts = ", every router one expert (of groups two each)," if "expert" in config.granularity else ","
        raise ConfigError(
            f"ratio={config.ratio} cannot be reached with granularity={list(config.granularity)} and "
            f"round_to={config.round_to}: every layer keeps at least one head and `round_to` neurons{experts} and "
            f"every stack one layer. At most {highest:.2f} of this model's {config.metric} can be removed. Lower "
            "`ratio` or `round_to`, or add to `granularity`."
        )
    alone = not kept and "expert" not in config.granularity
    if config.allocation == "uniform" and config.unit_kinds and costs.measure is None and alone:
        try:
            allocate_alike(anatomy, groups, config, costs.of, config.ratio * costs.total)
        except ConfigError as error:
            raise ConfigError(
                f"ratio={config.ratio} cannot be reached with allocation='uniform', granularity="
                f"{list(config.granularity)} and round_to={config.round_to}: all layers keep the same number, and the "
                "number of heads has to divide the width where stock classes ask for it. Lower `ratio` or `round_to`, "
                "add to `granularity`, or set allocation='global'."
            ) from error


def _least(groups: list[Group], config: PruningConfig, costs: Costs) -> dict[tuple[str, int], float]:
    """What each layer costs with the fewest of these units and, if they may leave, experts."""
    least = dict(costs.layers)
    for group in groups:
        removable = costs.of(group, group.units) - costs.of(group, fewest(group, config))
        for layer in group.layers:
            least[group.stack, layer] -= removable / len(group.layers)
    for mixture, cost in costs.experts.items() if "expert" in config.granularity else ():
        own = [one for one in groups if mixture.stack == one.stack and mixture.layer in one.layers]
        narrow = sum(costs.of(one, one.units) - costs.of(one, fewest(one, config)) for one in own if one.has_experts)
        gone = mixture.experts - mixture.counts()[-1]
        least[mixture.stack, mixture.layer] -= gone * (cost - narrow / mixture.experts)  # neurons have left already
    return least
