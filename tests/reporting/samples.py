"""A report with made-up numbers, no two of them alike, so that a test sees which one was shown."""

from dataclasses import replace

from hf_efficient.io.environment import Environment
from hf_efficient.reporting.schema import (
    Comparison,
    DatasetFacts,
    Latency,
    LayerStructure,
    Measurement,
    Quality,
    Report,
    Score,
    Size,
    StageRecord,
    Workload,
)

WORKLOAD = Workload(1, 128, (1, 128), 2, "float32", "cpu")
TEACHER = Measurement(
    "BertForSequenceClassification",
    WORKLOAD,
    Size(22_714_757, 11_919_360, 22_650_111, 90_859_028, 1_435_000_832, 98_765_432, 90_866_404),
    Latency(19.43, 22.81, 18.77, 31, 4),
    Quality(
        "text-classification",
        427,
        427,
        (Score("accuracy", 0.9672, 0.0086, True), Score("loss", 0.1417, 0.0213, False)),
    ),
)
STUDENT = Measurement(
    "EfficientBertForSequenceClassification",
    WORKLOAD,
    Size(16_833_221, 11_919_361, 16_820_000, 67_332_884, 688_123_456, 73_456_789, 67_340_011),
    Latency(10.58, 13.94, 9.86, 31, 4),
    Quality(
        "text-classification",
        427,
        427,
        (Score("accuracy", 0.9555, 0.0099, True), Score("loss", 0.1633, 0.0247, False)),
    ),
)
COMPARISON = Comparison(1.836, 1.851, 0.7411, 0.4795, 0.7412, 0.7438, "accuracy", -0.0117, 0.0066, 0.9789)
ENVIRONMENT = Environment("AMD EPYC", 6, None, "Linux x86_64", "3.11.7", "2.13.0+cpu", "5.23.0", "0.1.0")
STRUCTURE = tuple(
    LayerStructure(i, heads, 12, neurons, 1536, kind)
    for i, (heads, neurons, kind) in enumerate(
        [
            (12, 1152, "full"),
            (8, 896, "local"),
            (7, 760, "local"),
            (5, 640, "local"),
            (0, 0, "removed"),
            (6, 704, "full"),
        ]
    )
)


def sample_report(**changes) -> Report:
    report = Report(
        student=STUDENT,
        base_model="sentence-transformers/all-MiniLM-L6-v2",
        teacher=TEACHER,
        comparison=COMPARISON,
        auto_class="AutoModelForSequenceClassification",
        processor_class="AutoTokenizer",
        loads_with="plugin",
        licence="apache-2.0",
        dataset=DatasetFacts("SetFit/bbc-news", {"train": 1702, "test": 427}),
        stages=(
            StageRecord("pruning", 41.26, {"ratio": 0.55, "metric": "macs"}, {"layers_removed": [4]}),
            StageRecord("distillation", 233.7, {"temperature": 2.5, "alpha": 0.65}, {"final_loss": 0.2981}),
        ),
        structure=STRUCTURE,
        warnings=("Calibration used 48 samples only.",),
        recipe={"name": "bbc-fast", "pruning": {"ratio": 0.55}},
        seed=17,
        created="2026-11-23",
        commit="0123456789abcdef0123456789abcdef01234567",
        environment=ENVIRONMENT,
    )
    return replace(report, **changes)
