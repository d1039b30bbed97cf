"""Energy and CO2: what is asked of codecarbon, what is told of it, and what is not."""

import importlib
import sys
import types
from dataclasses import asdict, replace
from typing import ClassVar

import pytest
import torch
from huggingface_hub import ModelCard

from hf_efficient import ConfigError, Report, measure
from hf_efficient.measurement.energy import ESTIMATED, MEASURED, measure_energy, tracked, with_energy
from hf_efficient.recipes.recipe import Recipe
from hf_efficient.reporting.card import model_card
from hf_efficient.reporting.page import report_page
from hf_efficient.reporting.schema import StageRecord
from hf_efficient.reporting.tables import measurement_table, text_table

from ..families import make_model
from ..reporting.samples import STUDENT, TEACHER, sample_report

ENERGY = importlib.import_module("hf_efficient.measurement.energy")


class Tracker:
    """Each one says 2 Wh and, of a country, 0.5 g."""

    made: ClassVar[list] = []
    mode = "cpu_load"

    def __init__(self, **options):
        self.options, self.stopped = options, False
        self._hardware = [types.SimpleNamespace(_mode=self.mode)]
        Tracker.made.append(self)

    def start(self):
        self.started = True

    def stop(self):
        self.stopped = True
        self.final_emissions_data = types.SimpleNamespace(energy_consumed=0.002, emissions=0.0005)


@pytest.fixture
def codecarbon(monkeypatch):
    fake = types.ModuleType("codecarbon")
    fake.OfflineEmissionsTracker, fake.__version__ = Tracker, "9.8.7"
    monkeypatch.setitem(sys.modules, "codecarbon", fake)
    monkeypatch.setattr(ENERGY, "find_spec", lambda name: fake)
    monkeypatch.setattr(Tracker, "made", [])
    monkeypatch.setattr(ENERGY, "SECONDS", 0.0)
    return Tracker


def test_it_asks_for_no_file_and_no_network(codecarbon):
    result, used = tracked(lambda: "done", country="DEU")
    options = codecarbon.made[0].options
    assert result == "done" and options["save_to_file"] is options["save_to_api"] is False
    assert options["country_iso_code"] == "DEU" and options["log_level"] == "critical"
    assert (used.kwh, used.co2_grams, used.country) == (0.002, 0.5, "DEU") and used.tool == "codecarbon 9.8.7"


def test_without_a_country_there_is_no_co2(codecarbon):
    _, used = tracked(lambda: None)
    assert used.kwh == 0.002 and used.co2_grams is None


def test_estimates_are_called_estimates(codecarbon, monkeypatch):
    assert tracked(lambda: None)[1].source == ESTIMATED
    monkeypatch.setattr(codecarbon, "mode", "intel_rapl")
    assert tracked(lambda: None)[1].source == MEASURED


def test_it_is_stopped_when_the_work_fails(codecarbon):
    with pytest.raises(ZeroDivisionError):
        tracked(lambda: 1 / 0)
    assert codecarbon.made[0].stopped


def test_energy_is_that_of_a_thousand_inputs(codecarbon):
    calls = []
    energy = measure_energy(lambda: calls.append(1), batch_size=4, seconds=0.01)
    assert energy.inputs == 4 * (len(calls) - 1)  # the first one warms up
    assert energy.wh_per_1000 == pytest.approx(1000 * 2 / energy.inputs)


def test_a_measurement_tells_it_where_asked(codecarbon):
    model = make_model("bert")
    options = {"sequence_length": 8, "repeats": 2}
    plain = measure(model, **options)
    assert plain.energy is None and not codecarbon.made and "energy" not in measurement_table(plain)
    measured = measure(model, baseline=make_model("bert"), energy=True, **options)
    assert measured.energy.tool == "codecarbon 9.8.7" and measured.baseline.energy is not None
    table = measurement_table(measured)
    assert "energy of a thousand" in table and ESTIMATED in table


def test_without_codecarbon_the_fix_is_named(monkeypatch):
    monkeypatch.setattr(ENERGY, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "hf-efficient\[energy\]"'):
        measure(make_model("bert"), energy=True)


def with_footprint(country="DEU"):
    used = {"kwh": 0.002, "co2_grams": 0.5 if country else None, "country": country}
    used |= {"source": ESTIMATED, "tool": "codecarbon 9.8.7"}
    stages = tuple(StageRecord(name, 3.0, {}, {"energy": used}) for name in ("prune", "distill"))
    return sample_report(stages=stages)


def test_a_stage_keeps_what_it_used(codecarbon):
    facts = with_energy(lambda a, b: {"sum": a + b}, "DEU")(1, 2)
    assert facts["sum"] == 3 and facts["energy"]["kwh"] == 0.002


def test_the_footprint_is_that_of_all_stages():
    report = with_footprint()
    assert report.footprint.kwh == 0.004 and report.footprint.co2_grams == 1.0
    assert sample_report().footprint is None
    partly = replace(report, stages=(*report.stages, StageRecord("export", 1.0)))
    assert partly.footprint is None  # a part of it is not it
    assert with_footprint(None).footprint.co2_grams is None


def test_the_card_has_emissions_only_where_they_are_known():
    data = ModelCard(str(model_card(with_footprint()))).data.to_dict()
    assert data["co2_eq_emissions"]["emissions"] == 1.0 and data["co2_eq_emissions"]["geographical_location"] == "DEU"
    assert ESTIMATED in data["co2_eq_emissions"]["source"]
    for report in (sample_report(), with_footprint(None)):
        assert "co2_eq_emissions" not in ModelCard(str(model_card(report))).data.to_dict()
    assert "0.004 kWh" in str(model_card(with_footprint(None))) and ESTIMATED in str(model_card(with_footprint(None)))


def test_the_report_carries_it(codecarbon):
    energy = measure_energy(lambda: None, 1, seconds=0.01)
    report = sample_report(student=replace(STUDENT, energy=energy), teacher=replace(TEACHER, energy=energy))
    again = Report.from_json(report.to_json())
    assert again == report and again.student.energy == energy
    shown = f"{energy.wh_per_1000:.3g} Wh"
    for text in (text_table(report), report_page(report), str(model_card(report))):
        assert shown in text and ESTIMATED in text
    assert "energy of a thousand" not in text_table(sample_report())


def test_a_recipe_asks_for_it():
    from ..pipeline.tiny import TINY

    plain, asked = Recipe.from_dict(TINY), Recipe.from_dict(TINY | {"measure": {"energy": True, "country": "DEU"}})
    assert not {"energy", "country"} & set(plain.to_dict()["measure"])  # old runs go on
    assert asked.to_dict()["measure"]["country"] == "DEU" and asked.fingerprint() != plain.fingerprint()
    for bad, words in (({"energy": True, "country": "Germany"}, "DEU"), ({"country": "DEU"}, "energy to true")):
        with pytest.raises(ConfigError, match=words):
            Recipe.from_dict(TINY | {"measure": bad})


def test_the_real_one(tmp_path, monkeypatch, capfd):
    pytest.importorskip("codecarbon")
    monkeypatch.chdir(tmp_path)
    weights = torch.ones(200, 200)
    energy = measure_energy(lambda: weights @ weights, batch_size=2, seconds=1.5)
    assert 0 < energy.wh_per_1000 < 10 and energy.tool.startswith("codecarbon 3")
    assert set(asdict(energy)) == {"wh_per_1000", "inputs", "source", "tool"}
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")
