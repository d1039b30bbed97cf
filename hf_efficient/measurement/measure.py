"""Measure a model: size, cost, latency and quality, alone or against a baseline in one interleaved run.

    measurement = measure(student, baseline=teacher, dataset=test, collator=collator, sequence_length=128, threads=1)
    measurement.size.macs, measurement.latency.median_ms, measurement.comparison.speedup

Light to import: PyTorch is imported by the call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError, check_positive
from ..reporting.schema import Comparison, Energy, Measurement, Workload

if TYPE_CHECKING:
    import torch

__all__ = ["Measurement", "measure"]


def measure(
    model: "torch.nn.Module",
    *,
    dataset: Any = None,
    collator: Callable | None = None,
    task: str | None = None,
    batch_size: int = 1,
    sequence_length: int = 512,
    repeats: int = 20,
    warmup: int = 3,
    threads: int | None = None,
    baseline: "torch.nn.Module | None" = None,
    folder: str | Path | None = None,
    baseline_folder: str | Path | None = None,
    baseline_dataset: Any = None,
    baseline_collator: Callable | None = None,
    evaluation_batch_size: int = 32,
    pooling: str | None = None,
    baseline_pooling: str | None = None,
    energy: bool = False,
    metrics: Sequence[str] | Mapping[str, Any] = (),
) -> Measurement:
    """Measure `model`, and `baseline` (the teacher) next to it.

    Parameters:
        dataset, collator, task, metrics: as in `evaluate_quality`; without a data set quality is None.
        pooling: the same; None: as `modules.json` in `folder` says, else the mean of the tokens.
        batch_size, sequence_length: of the timed forward on `dummy_inputs`; images have the config's size.
        repeats, warmup: timed and uncounted rounds.
        threads: CPU threads while timing and evaluating; None leaves them as they are.
        baseline: timed in turn with `model`, evaluated on the same samples; fills `.baseline` and `.comparison`.
        folder, baseline_folder: where the checkpoints lie, for bytes on disk.
        baseline_dataset, baseline_collator: the same samples as the baseline gets them, such as cut shorter or in
            other tokens; default `dataset` and `collator`.
        baseline_pooling: default: as `pooling`, of its own folder.
        energy: also the energy of 1,000 inputs, some seconds for each model (needs codecarbon).

    Raises:
        ConfigError, DataError, UnsupportedModelError, CheckpointError: as the parts that it calls say.
    """
    sides = {"model": _Side(model, folder, dataset, collator, pooling)}
    if baseline is not None:
        rows = dataset if dataset is None or baseline_dataset is None else baseline_dataset
        pooled = baseline_pooling or pooling
        sides = {"baseline": _Side(baseline, baseline_folder, rows, baseline_collator or collator, pooled), **sides}
    for name, side in sides.items():
        _check_model(side.model, name)
    check_positive("repeats", repeats, least=2)
    if energy:
        from .energy import check_energy

        check_energy()
    if not isinstance(metrics, Mapping):
        from .scores import load_metrics

        metrics = load_metrics(metrics)
    timed = {"rounds": repeats, "warmup": warmup, "threads": threads}
    scored = {"task": task, "batch_size": evaluation_batch_size, "metrics": metrics}
    return _measure_sides(sides, (batch_size, sequence_length), timed, scored, energy)


def _measure_sides(
    sides: "dict[str, _Side]", shape: tuple[int, int], timed: dict, scored: dict, energy: bool
) -> Measurement:
    """`timed` goes to `compare_latency` (but for the threads), `scored` to `evaluate_quality`."""
    from ..io.codec import decode
    from ..models.inputs import dummy_inputs
    from ..models.modes import using_threads
    from ..training.ranks import count, from_main, on_main
    from .latency import compare_latency
    from .quality import evaluate_quality

    def inputs_of(each):
        return dummy_inputs(each, *shape)

    with using_threads(timed.pop("threads")):
        models = {name: side.model for name, side in sides.items()}
        timing = on_main(lambda: compare_latency(models, inputs_of, **timed))  # the machine is its own meanwhile
        evaluations = {
            name: evaluate_quality(side.model, side.dataset, side.collator, pooling=side.pools(), **scored)
            for name, side in sides.items()
            if side.dataset is not None
        }

        def joined() -> Measurement:
            measurements = {
                name: side.measurement(inputs_of(side.model), timing, name, evaluations.get(name), energy)
                for name, side in sides.items()
            }
            if "baseline" not in sides:
                return measurements["model"]
            return _joined(measurements["baseline"], measurements["model"], timing, evaluations)

        if count() == 1:
            return joined()
        return decode(Measurement, from_main(lambda: asdict(joined())), "the measurement of the main process")


@dataclass(frozen=True)
class _Side:
    """A model with what is its own: its folder, and the samples as it gets them."""

    model: "torch.nn.Module"
    folder: str | Path | None
    dataset: Any
    collator: Callable | None
    pooling: str | None = None

    def pools(self) -> str:
        """How the tokens of a text become its vector: as it was said, else as it is written in its folder."""
        from ..data.sentence_modules import read_modules

        found = None if self.pooling or self.folder is None else read_modules(self.folder)
        return self.pooling or (None if found is None else found.pooling) or "mean"

    def measurement(self, inputs: dict, timing: Any, name: str, evaluation: Any, energy: bool) -> Measurement:
        """What was measured of it; `timing` has its latency under `name`."""
        from .size import measure_size

        return Measurement(
            model=type(self.model).__name__,
            workload=_workload(self.model, inputs, timing.threads),
            size=measure_size(self.model, inputs, self.folder),
            latency=timing.latencies[name],
            quality=evaluation.quality if evaluation else None,
            energy=_energy(self.model, inputs) if energy else None,
        )


def _check_model(model: Any, name: str) -> None:
    """A transformers model, or one that passes for it, with its weights in memory."""
    import torch

    if not isinstance(model, torch.nn.Module) or not hasattr(model, "main_input_name"):
        raise UnsupportedModelError(
            f"measure needs a transformers model as {name}, got {type(model).__name__}. Load one: "
            "AutoModel.from_pretrained(folder)."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"{name} ({type(model).__name__}) has weights on the meta device, without memory: there is nothing to "
            "time. Load it with its weights; hf_efficient.plan gives sizes without them."
        )


def _energy(model: Any, inputs: dict) -> Energy:
    from ..models.modes import evaluating, synchronize
    from .energy import measure_energy

    def forward() -> None:
        model(**inputs)
        synchronize(model.device)

    with evaluating(model):
        return measure_energy(forward, inputs[model.main_input_name].shape[0])


def _workload(model: Any, inputs: dict, threads: int) -> Workload:
    shape = tuple(inputs[model.main_input_name].shape)
    return Workload(
        batch_size=shape[0],
        sequence_length=shape[1] if model.main_input_name == "input_ids" else None,
        input_shape=shape,
        threads=threads,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
    )


def _joined(teacher: Measurement, student: Measurement, timing: Any, evaluations: dict) -> Measurement:
    from .quality import compare_quality

    quality: dict[str, Any] = {}
    if evaluations:
        difference = compare_quality(evaluations["baseline"], evaluations["model"])
        quality = {
            "quality_score": difference.name,
            "quality_difference": difference.difference,
            "quality_difference_error": difference.standard_error,
            "agreement": difference.agreement,
            "similarity": difference.similarity,
        }
    comparison = Comparison(
        speedup=timing.speedup("baseline", "model"),
        paired_speedup=timing.paired_speedup("baseline", "model"),
        parameter_ratio=student.size.parameters / teacher.size.parameters,
        mac_ratio=student.size.macs / teacher.size.macs,
        weight_bytes_ratio=student.size.weight_bytes / teacher.size.weight_bytes,
        memory_ratio=student.size.peak_memory_bytes / teacher.size.peak_memory_bytes,
        **quality,
    )
    return replace(student, baseline=teacher, comparison=comparison)
