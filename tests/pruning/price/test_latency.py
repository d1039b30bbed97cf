"""A budget of milliseconds, on a clock that is a formula of the model's sizes: nothing here waits for a real one."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from hf_efficient import AttentionConfig, ConfigError, PruningCallback, PruningConfig, convert_attention, prune
from hf_efficient.attention.dispatch import variant_of
from hf_efficient.errors import UnsupportedModelError
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.pruning.price import correction, latency
from hf_efficient.pruning.price import latency_table as tables
from hf_efficient.pruning.price.latency import latency_costs, latency_table
from hf_efficient.pruning.prune import plan

from ...families import CASES
from .. import tiny

REST, LAYER = 20e-3, 4e-3  # seconds of embeddings and head, and of what no unit owns in a layer
EACH = {"heads": 5e-3, "cross_heads": 2e-3, "neurons": 0.5e-3}
LOCAL = 3.0  # how much dearer a head of local attention is


def seconds_of(model, bend: float = 0.0) -> float:
    """With `bend` parts together cost more than alone, as on real machines."""
    anatomy = Anatomy.of(model)
    layers = sum(len(stack.layers) for stack in anatomy.stacks)
    units = 0.0
    for group in anatomy.groups:
        stack = anatomy.stack(group.stack).entry
        for member in group.members:
            dear = 1.0
            if group.kind == "heads":
                module = model.get_submodule(f"{member.prefix}.{stack.attention.module}")
                dear = LOCAL if variant_of(module) is not None else 1.0
            units += dear * EACH[group.kind] * group.units
    return REST + LAYER * layers + units + bend * units**2


class Clock:
    """In place of `compare_latency`."""

    def __init__(self, bend: float = 0.0):
        self.bend, self.count = bend, 0

    def __call__(self, models, inputs_of, *, rounds, warmup):
        self.count += 1
        for model in models.values():
            assert inputs_of(model)
        times = {name: seconds_of(model, self.bend) for name, model in models.items()}
        return SimpleNamespace(
            latencies={name: SimpleNamespace(median_ms=1e3 * time, min_ms=1e3 * time) for name, time in times.items()},
            seconds={name: (2 * time, time) for name, time in times.items()},
        )


@pytest.fixture(autouse=True)
def clock(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_EFFICIENT_CACHE", str(tmp_path / "cache"))
    made = Clock()
    monkeypatch.setattr(latency, "compare_latency", made)
    return made


@pytest.fixture(scope="module")
def bert_table(tmp_path_factory):
    """The folder with the table of `short("bert")`, measured once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_EFFICIENT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(latency, "compare_latency", Clock())
        latency_table(short("bert"), 2, 16, threads=1)
        return tables.folder()


def config(ratio: float, **changes) -> PruningConfig:
    settings = {"metric": "latency", "importance": "magnitude", "layer_importance": "magnitude"}
    settings |= {"sequence_length": 16, "latency_batch_size": 2}
    return PruningConfig(ratio=ratio, **settings | changes)


def short(case: str, *sizes: int):
    return tiny.make(case, *sizes)


@pytest.mark.parametrize("case", ["bert", "vit", "llama", "gpt2", "t5"])
def test_prices_are_those_of_the_clock(case):
    model = short(case)
    costs = latency_costs(Anatomy.of(model), 2, 16)
    assert costs.total == pytest.approx(1e9 * seconds_of(model))
    for group in Anatomy.of(model).groups:
        for units in {1, group.units // 2, group.units} - {0}:
            wanted = 1e9 * EACH[group.kind] * units * len(group.members)
            assert costs.of(group, units) == pytest.approx(wanted, rel=1e-6)
    assert costs.total - sum(costs.layers.values()) == pytest.approx(1e9 * REST, rel=1e-6)


def test_prices_between_measured_sizes_are_on_the_line(clock):
    clock.bend = 1.0
    (heads, neurons) = latency_table(short("bert"), 2, 16).curves
    (x, y), (next_x, next_y) = neurons.points[1:3]
    assert neurons.saved((x + next_x) / 2) == pytest.approx((y + next_y) / 2)
    slopes = [heads.price(kept / 4) - heads.price((kept - 1) / 4) for kept in range(1, 5)]
    assert heads.price(0.0) == 0 and slopes == sorted(slopes) and slopes[-1] > slopes[0] > 0  # it bends, and rises


def test_noise_never_makes_fewer_units_dearer(clock, monkeypatch):
    def noisy(models, inputs_of, **options):
        found = clock(models, inputs_of, **options)
        found.seconds["small"] = (found.seconds["small"][0] * (1 + 0.5 * (-1) ** (clock.count // 2)),)
        return found

    monkeypatch.setattr(latency, "compare_latency", noisy)
    for curve in latency_table(short("bert"), 2, 16).curves:
        saved = [curve.saved(kept / 20) for kept in range(21)]
        assert saved == sorted(saved, reverse=True)


def test_converted_layers_have_prices_of_their_own():
    model = convert_attention(short("bert"), AttentionConfig(kind="local", window=4), layers=[1])
    costs = latency_costs(Anatomy.of(model), 2, 16)
    heads = [costs.of(group, 2) for group in Anatomy.of(model).groups if group.kind == "heads"]
    assert heads[0] == pytest.approx(heads[2]) and heads[1] == pytest.approx(LOCAL * heads[0])
    assert costs.layers["encoder", 1] > costs.layers["encoder", 0] == pytest.approx(costs.layers["encoder", 2])


@pytest.mark.cover
@pytest.mark.parametrize("bend", [0.0, 2.0])
@pytest.mark.parametrize("case", ["bert", "vit", "llama", "t5"])
def test_the_asked_time_is_reached(case, bend, clock):
    clock.bend = bend
    model = short(case)
    for speedup in (1.3, 2.0):
        small = prune(model, config(1 - 1 / speedup, round_to=1))
        assert seconds_of(model, bend) / seconds_of(small, bend) == pytest.approx(speedup, rel=0.07), case


def test_without_correction_it_would_not_be(clock, monkeypatch):
    """The twin of the last one: prices alone miss where parts do not add up."""
    clock.bend = 6.0
    model = short("bert")
    asked = config(0.7, round_to=1)
    corrected = abs(seconds_of(prune(model, asked), 6.0) / seconds_of(model, 6.0) / 0.3 - 1)
    monkeypatch.setattr(correction, "CORRECTIONS", 0)
    alone = abs(seconds_of(prune(model, asked), 6.0) / seconds_of(model, 6.0) / 0.3 - 1)
    assert corrected < 0.05 and alone > 0.1


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("steps", [1, 3])
def test_allocations_and_steps(allocation, steps):
    model = short("bert")
    small = prune(model, config(0.4, allocation=allocation, steps=steps, round_to=4))
    assert seconds_of(small) / seconds_of(model) == pytest.approx(0.6, rel=0.07)
    if allocation == "uniform":
        assert len({(group.kind, group.units) for group in Anatomy.of(small).groups}) == 2


def test_layers_alone_and_with_units():
    model = short("bert", 6)
    small = prune(model, config(0.4, granularity="layer"))
    assert tiny.depths(small) == {"encoder": 3} and tiny.sizes(small)["encoder", "neurons", 0] == tiny.NEURONS
    both = prune(model, config(0.7, granularity=("layer", "head", "neuron"), round_to=1))
    assert tiny.depths(both)["encoder"] < 6
    assert seconds_of(both) / seconds_of(model) == pytest.approx(0.3, rel=0.07)


def test_what_is_out_of_reach_names_the_highest_speedup():
    model = short("bert")
    with pytest.raises(ConfigError, match=r"10.00 times as fast.*speed-up of at most 2\.78 \(ratio 0\.64"):
        prune(model, config(0.9))
    least = REST + 3 * (LAYER + EACH["heads"] + 8 * EACH["neurons"])
    highest = 1 - least / seconds_of(model)
    small = prune(model, config(highest - 0.001))
    assert seconds_of(small) == pytest.approx(least)


def test_a_plan_says_the_times():
    model = short("bert")
    found = plan(model, config(0.4, round_to=1))
    assert found.forecast.latency_ms_before == pytest.approx(1e3 * seconds_of(model))
    assert found.forecast.latency_ms == pytest.approx(1e3 * seconds_of(prune(model, plan=found)))
    assert plan(model, config(0.4, metric="macs")).forecast.latency_ms is None


def test_a_table_is_measured_once(clock):
    model = short("bert")
    table = latency_table(model, 2, 16)
    measured = clock.count
    assert measured > 0 and latency_table(short("bert"), 2, 16) == table and clock.count == measured


def test_a_table_that_cannot_be_true_is_not_kept(clock, monkeypatch):
    monkeypatch.setattr(f"{__name__}.REST", -1e-3)
    assert latency_table(short("bert"), 2, 16).rest_ms < 0
    assert not tables.folder().exists()


@pytest.mark.parametrize("what", ["batch", "length", "sizes", "dtype", "attention", "threads", "machine"])
def test_another_table_is_another_file(what, clock, bert_table, monkeypatch):
    shutil.copytree(bert_table, tables.folder())
    latency_table(short("bert"), 2, 16, threads=1)
    assert clock.count == 0
    measured, model, batch, length, threads = clock.count, short("bert"), 2, 16, 1
    if what == "batch":
        batch = 3
    elif what == "length":
        length = 17
    elif what == "sizes":
        model = short("bert", 2)
    elif what == "dtype":
        model = model.to(torch.bfloat16)
    elif what == "attention":
        model = convert_attention(model, AttentionConfig(kind="local", window=4))
    elif what == "threads":
        threads = 2
    else:
        other = tables.Environment.collect()
        object.__setattr__(other, "cpu", "another")
        monkeypatch.setattr(tables.Environment, "collect", lambda: other)
    latency_table(model, batch, length, threads=threads)
    assert clock.count > measured


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"curves": 3}', '{"total_ms": "x"}'])
def test_a_damaged_file_is_measured_again(text, clock, bert_table):
    shutil.copytree(bert_table, tables.folder())
    model = short("bert")
    table = latency_table(model, 2, 16)
    assert clock.count == 0
    (file,) = tables.folder().iterdir()
    file.write_text(text)
    measured = clock.count
    assert latency_table(model, 2, 16) == table and clock.count > measured
    assert json.loads(file.read_text())["total_ms"] == table.total_ms


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_EFFICIENT_CACHE", str(tmp_path / "file"))
    assert latency_table(short("bert"), 2, 16).total_ms > 0


def test_a_table_can_be_read():
    shown = str(latency_table(short("t5"), 2, 16))
    for part in ("encoder: 4 heads", "decoder: 4 cross heads", "decoder: 48 neurons", "whole layer", "head"):
        assert part in shown
    assert len({line.count("|") for line in shown.splitlines() if line.startswith("|")}) == 1


def test_refusals():
    with pytest.raises(ConfigError, match="metric='macs'"):
        PruningCallback(config(0.5))
    with torch.device("meta"):
        model = tiny.bert()
    with pytest.raises(ConfigError, match="meta device"):
        latency_table(model, 2, 16)
    with pytest.raises(ConfigError, match="Use at most 32"):
        latency_table(short("bert"), 2, 33)


@pytest.mark.parametrize("name", ["clip", "whisper"])
def test_inputs_that_cannot_be_made_up(name):
    case = CASES[name]
    fields = case.config() if callable(case.config) else case.config
    with pytest.raises(UnsupportedModelError, match="metric='macs'"):
        latency_table(case.head(case.head.config_class(**fields)), 2, 16)


def test_on_a_real_clock_it_runs(monkeypatch):
    from hf_efficient.measurement.latency import compare_latency

    monkeypatch.setattr(latency, "compare_latency", compare_latency)
    monkeypatch.setattr(latency, "ROUNDS", (2, 3))
    table = latency_table(short("bert"), 2, 16)
    assert table.total_ms > 0 and len(table.curves) == 2
