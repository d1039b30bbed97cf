"""`quantize: auto` takes the fastest of those that lose little, by rows neither calibrated on nor of the test."""

from types import SimpleNamespace

import pytest
import torch
from transformers import BertForSequenceClassification

from hf_efficient import ConfigError, UnsupportedModelError
from hf_efficient.measurement.latency import LatencyComparison, summarize
from hf_efficient.reporting.schema import StageRecord
from hf_efficient.runtimes import choice
from hf_efficient.runtimes.choice import choose
from hf_efficient.runtimes.export import Exported
from hf_efficient.runtimes.runtime import Reader, Work
from hf_efficient.stages.export import CALIBRATED, ExportStage, calibration_batches, judged_rows

from ..families import VOCABULARY, make_model

WORK = Work("text-classification", 1, 8, 3)


@pytest.fixture
def chosen(tmp_path, monkeypatch):
    """`chosen("openvino", {way: (loss, seconds)})` -> what `choose` gives; a loss of None cannot be made."""

    def get(format, ways, allowed=0.5):
        asked = []

        def make(way, place):
            asked.append(way)
            if ways[way][0] is None:
                raise UnsupportedModelError("it computes nonsense")
            place.mkdir()
            (place / "program").write_text(str(way))
            return Exported(format, "1", way, place, 9, 0.1, 1.0, ())

        def timed(programs, inputs_of, rounds):
            seconds = {name: [ways[None if name == "None" else name][1]] * rounds for name in programs}
            return LatencyComparison(seconds, {name: summarize(each, 1) for name, each in seconds.items()}, 1)

        def program(model, format, place):
            return (place / "program").read_text()

        monkeypatch.setattr(choice, "Runtime", program)
        monkeypatch.setattr(choice, "_judge", lambda reader, work: lambda program: ways[program][0])
        monkeypatch.setattr(choice, "compare_latency", timed)
        reader = Reader(make_model("bert", num_hidden_layers=1), [], list)
        made, tried = choose(format, make, tmp_path / f"{format}-auto", reader, WORK, allowed)
        assert [each.name for each in tmp_path.iterdir()] == [made.folder.name], "what was not taken is gone"
        assert (made.folder / "program").read_text() == str(made.quantize)
        return made.quantize, {each.quantize: each for each in tried}, asked

    return get


def test_the_fastest_that_loses_little_is_taken(chosen):
    way, tried, _ = chosen("onnx", {None: (0.0, 3.0), "int8": (0.4, 1.0), "int8_static": (0.1, 2.0)})
    assert way == "int8" and tried["int8"].loss == 0.4 and tried["int8_static"].milliseconds == 2000


def test_what_ruins_the_model_is_not_taken_however_fast(chosen):
    ways = {None: (0.0, 3.0), "int8": (0.6, 1.0), "int8_static": (float("nan"), 0.5)}
    way, tried, _ = chosen("onnx", ways)
    assert way is None and tried["int8"].milliseconds is None and tried["int8_static"].milliseconds is None
    record = StageRecord("export", 1.0, {}, {"quantize": None, "tried": [vars(each) for each in tried.values()]})
    [note] = ExportStage(quantize="auto").note(record)
    assert "onnx-auto is in floats" in note and "at most 0.5" in note and "int8 0.6 lost" in note


def test_nor_what_is_slower_than_floats(chosen):
    assert chosen("onnx", {None: (0.0, 1.0), "int8": (0.0, 1.5), "int8_static": (0.0, 1.2)})[0] is None


def test_what_cannot_be_made_is_told(chosen):
    way, tried, _ = chosen("onnx", {None: (0.0, 3.0), "int8": (0.0, 2.0), "int8_static": (None, 0.0)})
    assert way == "int8" and tried["int8_static"].reason == "it computes nonsense"
    assert tried["int8_static"].loss is None


def test_layers_are_put_back_only_where_it_is_needed(chosen):
    assert chosen("openvino", {None: (0.0, 3.0), "int8": (0.1, 1.0), "int8_accurate": (0.0, 2.0)})[2] == [None, "int8"]


def test_and_then_they_are(chosen):
    way, _, asked = chosen("openvino", {None: (0.0, 3.0), "int8": (0.9, 1.0), "int8_accurate": (0.2, 2.0)})
    assert way == "int8_accurate" and asked == [None, "int8", "int8_accurate"]


def test_vectors_and_rankings_are_judged_by_what_they_point_at():
    torch.manual_seed(0)
    mask = torch.ones(5, dtype=torch.long)
    rows = [{"input_ids": torch.randint(3, VOCABULARY, (5,)), "attention_mask": mask} for _ in range(6)]

    def collator(some):
        return {name: torch.stack([row[name] for row in some]) for name in rows[0]}

    class Shifted(torch.nn.Module):
        """Adds what a score may add, or noise."""

        def __init__(self, model, noise):
            super().__init__()
            self.model, self.noise, self.config = model, noise, model.config
            self.main_input_name, self.anchor = "input_ids", torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask):
            out = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
            return (3 * out + 7 if self.noise == 0 else out + self.noise * torch.randn_like(out),)

    for task, labels in (("sentence-embeddings", None), ("reranking", 1)):
        sizes = {"num_hidden_layers": 1} | ({"num_labels": labels} if labels else {})
        model = make_model("bert", BertForSequenceClassification, **sizes).eval()
        model = model if labels else model.bert
        judge = choice._judge(Reader(model, rows, collator), Work(task, 1, 5, 2))
        assert judge(model) == pytest.approx(0, abs=1e-3) and judge(Shifted(model, 10.0)) > 5
        if labels:
            assert judge(Shifted(model, 0)) == pytest.approx(0, abs=1e-2), "an order stays"


def test_rows_that_judge_are_not_those_that_calibrate():
    prepared = SimpleNamespace(train=list(range(1000)), test=[-1], collator=list)
    calibrated = [row for [row] in calibration_batches(prepared, CALIBRATED)]
    judged = judged_rows(prepared, CALIBRATED)
    assert len(set(calibrated)) == CALIBRATED and len(set(judged)) == 512 and not set(calibrated) & set(judged)
    assert max(calibrated) > 900 and max(judged) > 900, "from all over"
    few = SimpleNamespace(train=[1, 2, 3], collator=list)
    assert judged_rows(few, 128) == [1, 2, 3] and len(calibration_batches(few, 128)) == 3


def test_recipes_without_it_are_those_of_before():
    assert ExportStage(quantize="int8").to_dict() == {"format": "onnx", "quantize": "int8"}
    asked = ExportStage(quantize="auto", calibration_samples=64)
    assert asked.to_dict() == {"format": "onnx", "quantize": "auto", "calibration_samples": 64}
    assert asked.beside == "onnx-auto"
    with pytest.raises(ConfigError, match="calibration_samples must be an integer"):
        ExportStage(calibration_samples=0)
