"""What heads, neurons and layers cost in time on this machine: the prices behind `metric="latency"`.

    table = latency_table(model, batch_size=8, sequence_length=128)
    print(table)                                      # milliseconds of a layer, microseconds of a head and a neuron

    small = prune(model, PruningConfig(ratio=0.5, metric="latency", sequence_length=128), calibration)  # twice as fast

MACs say little about time: narrow products run at a lower speed, norms and softmax count for nothing, embeddings and
head stay. So sized copies are timed against the dense model, in turns: with fewer heads, or fewer neurons, in all
layers that are built alike, and with fewer layers. Between the measured sizes prices are linear (as in Kwon 2022,
section 4.1, whose latency tables are linear above a threshold). Savings are taken to add up; what that misses,
`correction.py` finds by timing the planned model itself.

A table is measured once for a model's sizes, its inputs and this machine, and kept (`latency_table.py`).
"""

from collections.abc import Iterable, Mapping
from statistics import median

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ...errors import ConfigError, UnsupportedModelError
from ...measurement.latency import compare_latency
from ...models.anatomy import Anatomy
from ...models.family import NEURON_KINDS
from ...models.groups import Group
from ...models.inputs import dummy_inputs
from ...models.modes import using_threads
from ...models.rebuild import check_model
from ...training.ranks import from_main
from ..cut.surgery import apply_plan
from ..plan import PruningPlan
from .costs import Costs
from .latency_table import Curve, LatencyTable, load, make_key, save

FRACTIONS = (0.75, 0.5, 0.25, 0.0)  # of the units that stay; of none the fewest that can
FEWEST = {"heads": 1, "cross_heads": 1} | dict.fromkeys(NEURON_KINDS, 8)
NEURON_STEP = 8  # odd widths are slow, and no plan has them
SECONDS = 2.0  # to time one copy for the table; a planned model gets twice as long
ROUNDS = (8, 60)  # how many that may be
NANOSECONDS = 1e6  # in a millisecond: prices are nanoseconds, of which half a one is nothing

logger = logging.get_logger(__name__)


def latency_table(
    model: PreTrainedModel, batch_size: int = 8, sequence_length: int = 128, threads: int | None = None
) -> LatencyTable:
    """The times of this model's parts, measured now or read from the cache.

    Parameters:
        model: a model of a family in the table, with weights; timed as it is, on its device and in its dtype.
        batch_size, sequence_length: of the inputs (`models.inputs.dummy_inputs`); images have a size of their own. An
            encoder-decoder reads that many tokens and makes one.
        threads: CPU threads; None: as many as torch uses now.

    Raises:
        ConfigError: the model is on the meta device, or takes no inputs that long.
        UnsupportedModelError: not a model of the table, or one whose inputs cannot be made up.
    """
    return _table_of(Anatomy.of(check_model(model)), batch_size, sequence_length, threads)


def latency_costs(anatomy: Anatomy, batch_size: int, sequence_length: int) -> Costs:
    """Nanoseconds of one forward; `total` is the whole model, embeddings and head included."""
    table = _table_of(anatomy, batch_size, sequence_length)
    total = table.total_ms * NANOSECONDS
    places = {name: (curve, share) for curve in table.curves for name, share in curve.groups.items()}

    def price(group: Group, units: int) -> float:
        curve, share = places[group.name]
        return total * share * curve.price(units / group.units)

    layers = {
        (stack, index): max(1.0, total * share)
        for stack, shares in table.layers.items()
        for index, share in enumerate(shares)
    }
    watch = Stopwatch(anatomy, batch_size, sequence_length, 2 * SECONDS)
    return Costs(price, layers, total, lambda plan: total * from_main(lambda: watch.time(plan)))


def _table_of(anatomy: Anatomy, batch_size: int, sequence_length: int, threads: int | None = None) -> LatencyTable:
    model = anatomy.model
    if model.device.type == "meta":
        raise ConfigError("Time is measured on weights, and this model is on the meta device. Load it with weights.")
    two_towers = len(anatomy.stacks) > 1 and any(stack.entry.sees_patches for stack in anatomy.stacks)
    if model.main_input_name == "input_features" or two_towers:
        raise UnsupportedModelError(
            f"Time is measured on made-up tokens or pixels; {type(model).__name__} takes sound, or text and image "
            "together. Prune it with metric='macs', or its towers one by one."
        )
    with using_threads(threads) as used:
        key = make_key(model, batch_size, sequence_length, used)
        table = from_main(lambda: (load(key) or _measured(anatomy, batch_size, sequence_length, used, key)).to_dict())
    return LatencyTable.from_dict(table)


def _measured(anatomy: Anatomy, batch_size: int, sequence_length: int, threads: int, key: str) -> LatencyTable:
    """Now; and kept under the key."""
    watch = Stopwatch(anatomy, batch_size, sequence_length)
    curves = tuple(_curve(watch, groups) for groups in _alike(anatomy))
    layers = _layer_shares(watch, curves)
    total, device = median(watch.dense_ms), str(anatomy.model.device)  # the median when all is timed
    table = LatencyTable(batch_size, sequence_length, threads, device, total, curves, layers)
    if table.rest_ms > 0:
        save(key, table)
    else:
        logger.warning(
            "By these times the layers take longer than the whole model: the machine is too busy to measure. "
            "The table is used and not kept."
        )
    return table


class Stopwatch:
    """Times the model of a plan against the dense one, in turns.

    Sizes alone decide, so each set of sizes is timed once.
    """

    def __init__(self, anatomy: Anatomy, batch_size: int, sequence_length: int, seconds: float = SECONDS):
        self.anatomy, self.batch_size, self.length, self.seconds = anatomy, batch_size, sequence_length, seconds
        self.dense_ms: list[float] = []
        self._known: dict[tuple, float] = {}

    def time(self, plan: PruningPlan) -> float:
        """What fraction of the dense model's time the planned one takes: shortest forward against shortest.

        What else runs on a machine only adds time, so the shortest says most about the model. The two take turns.
        """
        sizes = tuple(sorted(plan.layers.items())), tuple((name, len(kept)) for name, kept in plan.units.items())
        if sizes not in self._known:
            self._known[sizes] = self._time({"dense": self.anatomy.model, "small": apply_plan(self.anatomy, plan)})
        return self._known[sizes]

    def _time(self, models: Mapping[str, PreTrainedModel]) -> float:
        def inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
            return dummy_inputs(model, self.batch_size, self.length)

        first = compare_latency(models, inputs, rounds=2, warmup=1)
        expected = sum(latency.median_ms for latency in first.latencies.values()) / 1e3
        rounds = min(max(int(self.seconds / expected), ROUNDS[0]), ROUNDS[1])
        timing = compare_latency(models, inputs, rounds=rounds, warmup=1)
        self.dense_ms.append(timing.latencies["dense"].min_ms)
        return min(timing.seconds["small"]) / min(timing.seconds["dense"])


def _alike(anatomy: Anatomy) -> Iterable[list[Group]]:
    """Groups of one stack and kind whose layers compute alike; an attention of another kind has another price."""
    alike: dict[tuple, list[Group]] = {}
    for group in anatomy.groups:
        entry = anatomy.block.stack(group.stack)
        sizes, first = anatomy.stack(group.stack).sizes, group.layers[0]
        attention = {"heads": entry.attention, "cross_heads": entry.cross_attention}.get(group.kind)
        kind = attention[first] if attention else None
        types = [getattr(sizes, name)[first] for name in anatomy.family.per_layer] if group.kind == "heads" else []
        alike.setdefault((group.stack, group.kind, repr(kind), repr(types)), []).append(group)
    return alike.values()


def _curve(watch: Stopwatch, groups: list[Group]) -> Curve:
    whole = sum(group.units for group in groups)
    points = {1.0: 0.0}
    for fraction in FRACTIONS:
        kept = {}
        for group in groups:
            count = round(fraction * group.units)
            if group.is_neurons:
                count -= count % NEURON_STEP
            kept[group.name] = tuple(range(min(group.units, max(count, FEWEST[group.kind]))))
        part = sum(map(len, kept.values())) / whole
        if part < 1 and part not in points:
            saved = 1 - watch.time(PruningPlan(units=kept))
            points[part] = max(saved, *points.values())  # fewer units never cost more: the rest is noise
    return Curve(
        stack=groups[0].stack,
        kind=groups[0].kind,
        groups={group.name: group.units / whole for group in groups},
        units=groups[0].units,
        points=tuple(sorted(points.items())),
    )


def _layer_shares(watch: Stopwatch, curves: tuple[Curve, ...]) -> dict[str, tuple[float, ...]]:
    """For each stack what each of its layers takes of the whole time: its units, and an equal part of what they leave
    of the time of a layer (norms, and what no unit owns)."""
    anatomy, deepest = watch.anatomy, watch.anatomy.family.deepest
    prices = {name: share * curve.price(1.0) for curve in curves for name, share in curve.groups.items()}
    depths = {stack.name: len(stack.layers) for stack in anatomy.stacks}
    units = {name: [0.0] * depth for name, depth in depths.items()}
    for group in anatomy.groups:
        for layer in group.layers:
            units[group.stack][layer] += prices[group.name] / len(group.layers)
    shares: dict[str, tuple[float, ...]] = {}
    for name in sorted(depths, key=lambda name: name == deepest):  # it becomes shorter only with the others
        several = depths if name == deepest else [name]
        kept = {stack: tuple(range(0, depths[stack], 2)) for stack in several if depths[stack] > 1}
        rest = 0.0
        if name in kept:
            saved = 1 - watch.time(PruningPlan(layers=kept))
            saved -= sum(sum(shares[other][1::2]) for other in kept if other != name)
            rest = (saved - sum(units[name][1::2])) / (depths[name] // 2)
        shares[name] = tuple(share + rest for share in units[name])
    return shares
