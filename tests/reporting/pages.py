"""A report with all there is, and a page whose tags are closed."""

from dataclasses import replace
from html.parser import HTMLParser

from hf_efficient.reporting.schema import ExportRecord, LengthPoint, StageRecord

from .samples import STUDENT, sample_report

VOID = {"meta", "link", "br"}


def full_report():
    report = sample_report()
    curve = [{"step": step, "loss": 2 / step, "loss_kd": 1 / step} for step in (10, 20, 30)]
    exported = ExportRecord(
        "onnx",
        "onnxruntime 1.32.0",
        "int8",
        "onnx-int8",
        5_000_000,
        0.01,
        STUDENT.latency,
        9.4,
        STUDENT.quality,
        -0.001,
        0.002,
    )
    return replace(
        report,
        stages=(*report.stages, StageRecord("distill", 30.0, {}, {"curve": curve})),
        exports=(exported,),
        lengths=(LengthPoint(128, 2.0, 9.0), LengthPoint(512, 8.0, 50.0)),
    )


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links = [], set(), []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids.add(attributes.get("id"))
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    return parser
