"""What a step of distillation costs: against its parts, against a plain Trainer, and against two peers.

    pip install --no-deps --target peers textbrewer trl tensorboard absl-py
    PYTHONPATH=peers python benchmarks/distillation.py --output benchmarks/results/distillation_cpu.json

Two pairs of models: `classifier`, all-MiniLM-L6-v2 (6 layers) and its student of 3 layers, 16 x 128 tokens; and
`language`, a Llama of 6 layers and 16,384 entries and its student of 3, 4 x 256 tokens. One step is what a Trainer
does with one batch: collate, count, forward, loss, backward, AdamW. All ways of one pair take turns in each round, in
another order each time; a ratio is the median over rounds of the ratio within a round, so what slows the machine down
slows both.

    live     DistillationTrainer, kd (and ce), against (the teacher's forward + the step of a plain Trainer)
    cached   the same from a TeacherCache, against the step of a plain Trainer (ce)
    peer     the same losses by TextBrewer's GeneralDistiller (classifier: hard labels, kd as cross-entropy, hidden
             MSE) and by TRL's generalized JSD (language) in a bare loop, against DistillationTrainer

`values` compares the losses themselves on the same tensors: TextBrewer's kd is a cross-entropy without T^2, ours minus
that is the teacher's entropy; TRL's JSD is ours with `temperature_squared=False`. `copies` counts the tensors of the
size of the logits that live at once in the loss, beside the two that the models gave.
"""

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator

from hf_efficient import DistillationArguments, DistillationTrainer, TeacherCache, build_student, cache_teacher
from hf_efficient.data.bundled import bundled_model
from hf_efficient.distillation.losses.losses import hidden_loss, kd_loss
from hf_efficient.io.environment import Environment, package_commit
from hf_efficient.models.modes import using_threads
from hf_efficient.reporting.tables import markdown

ROWS = 64
PAIRS = ((0, 0), (1, 1), (2, 3), (3, 6))  # what `build_student(teacher, 3)` follows
TEMPERATURE = 2.0
SHAPES = {"classifier": (16, 128), "language": (4, 256)}
LLAMA = {
    "vocab_size": 16384,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
}

Step = Callable[[], None]


def make_models(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Teacher and student without dropout, so that all do the same arithmetic."""
    transformers.set_seed(0)
    if name == "classifier":
        kind = transformers.AutoModelForSequenceClassification
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        teacher = kind.from_pretrained(bundled_model("minilm-l6"), num_labels=5, **quiet)
    else:
        teacher = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    return teacher.eval(), build_student(teacher, 3)


def make_rows(name: str) -> Dataset:
    _, length = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 16000, (ROWS, length), generator=generator)
    labels = ids if name == "language" else torch.randint(0, 5, (ROWS,), generator=generator)
    columns = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": labels.tolist()}
    return Dataset.from_dict(columns)


def arguments(kind: type, folder: str, batch: int, **more: Any) -> Any:
    return kind(
        output_dir=folder,
        per_device_train_batch_size=batch,
        max_steps=10**6,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **more,
    )


def trainer_step(trainer: Trainer, rows: Dataset) -> Step:
    """One optimizer step of a Trainer on the next batch, by the methods that its own loop calls."""
    trainer.create_optimizer()
    model, optimizer, batch = trainer.model, trainer.optimizer, trainer.args.per_device_train_batch_size
    starts = list(range(0, ROWS, batch))
    turn = 0

    def step() -> None:
        nonlocal turn
        start = starts[turn % len(starts)]
        turn += 1
        inputs = trainer.data_collator([rows[i] for i in range(start, start + batch)])
        batches, count = trainer.get_batch_samples(iter([inputs]), 1, trainer.args.device)
        trainer.training_step(model, batches[0], count)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()

    return step


def peer_step(
    name: str, teacher: PreTrainedModel, student: PreTrainedModel, rows: Dataset, folder: str
) -> tuple[str, Step] | None:
    batch = SHAPES[name][0]
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5)
    student.train()
    try:
        compute = textbrewer_loss(teacher, student, folder) if name == "classifier" else trl_loss(teacher, student)
    except ImportError as error:
        print(f"No peer for {name}: {error}", flush=True)
        return None
    turn = 0

    def step() -> None:
        nonlocal turn
        start = (turn * batch) % ROWS
        turn += 1
        compute(default_data_collator([rows[i] for i in range(start, start + batch)])).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return ("TextBrewer" if name == "classifier" else "TRL"), step


def textbrewer_loss(teacher: PreTrainedModel, student: PreTrainedModel, folder: str) -> Callable[[dict], torch.Tensor]:
    import textbrewer

    def adapt(batch: dict, outputs: Any) -> dict[str, Any]:
        found = {"logits": (outputs.logits,), "hidden": outputs.hidden_states, "inputs_mask": batch["attention_mask"]}
        return found | ({"losses": (outputs.loss,)} if outputs.loss is not None else {})

    matches = [
        {"layer_T": other, "layer_S": own, "feature": "hidden", "loss": "hidden_mse", "weight": 1 / len(PAIRS)}
        for own, other in PAIRS
    ]
    config = textbrewer.DistillationConfig(
        temperature=TEMPERATURE, hard_label_weight=1.0, kd_loss_type="ce", intermediate_matches=matches
    )
    training = textbrewer.TrainingConfig(output_dir=folder, log_dir=None, device="cpu")
    distiller = textbrewer.GeneralDistiller(training, config, teacher, student, adapt, adapt)
    return lambda inputs: distiller.train_on_batch(inputs, {"output_hidden_states": True})[0]


def trl_loss(teacher: PreTrainedModel, student: PreTrainedModel) -> Callable[[dict], torch.Tensor]:
    from trl.experimental.gkd import GKDTrainer

    def compute(inputs: dict) -> torch.Tensor:
        given = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad():
            other = teacher(**given, use_cache=False).logits
        own = student(**given, use_cache=False).logits
        return GKDTrainer.generalized_jsd_loss(
            own[:, :-1], other[:, :-1], inputs["labels"][:, 1:], beta=0.5, temperature=TEMPERATURE
        )

    return compute


def ours(name: str) -> dict[str, Any]:
    """The settings under which our losses are those of the peer."""
    if name == "classifier":
        return {"losses": {"ce": 1.0, "kd": 1.0, "hidden": 1.0}, "temperature_squared": False}
    return {"losses": {"kd": 1.0}, "divergence": "jsd", "temperature_squared": False}


def steps_of(name: str, folder: str) -> dict[str, Step]:
    """All ways of one pair, each with a student of its own."""
    batch, _ = SHAPES[name]
    rows = make_rows(name)
    teacher, _ = make_models(name)
    inputs = default_data_collator([rows[i] for i in range(batch)])
    given = {key: value for key, value in inputs.items() if key != "labels"}

    def ask() -> None:
        with torch.no_grad():
            teacher(**given, use_cache=False) if name == "language" else teacher(**given)

    cache_folder = f"{folder}/cache"
    top = {"top_k": 64, "temperature": TEMPERATURE} if name == "language" else {}
    cache_teacher(teacher, rows, cache_folder, batch_size=batch, **top)
    losses = {"losses": {"ce": 1.0, "kd": 1.0}, "temperature": TEMPERATURE}

    def distiller(teacher: Any, **settings: Any) -> Step:
        args = arguments(DistillationArguments, folder, batch, **settings)
        trainer = DistillationTrainer(make_models(name)[1], args, teacher=teacher, train_dataset=rows)
        return trainer_step(trainer, rows)

    plain = Trainer(make_models(name)[1], arguments(TrainingArguments, folder, batch), train_dataset=rows)
    ways = {
        "teacher": ask,
        "plain": trainer_step(plain, rows),
        "live": distiller(teacher, **losses),
        "cached": distiller(TeacherCache(cache_folder), **losses),
        "as peer": distiller(teacher, temperature=TEMPERATURE, **ours(name)),
    }
    peer = peer_step(name, make_models(name)[0], make_models(name)[1], rows, folder)
    return ways if peer is None else ways | {peer[0]: peer[1]}


def measure(ways: dict[str, Step], rounds: int) -> dict[str, Any]:
    """Seconds of each way in each round, and the ratios."""
    for step in ways.values():
        step()
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - start)
    columns = {name: torch.tensor(values) for name, values in seconds.items()}
    ratios = {
        "live / (teacher + plain)": columns["live"] / (columns["teacher"] + columns["plain"]),
        "cached / plain": columns["cached"] / columns["plain"],
    }
    peers = [name for name in ("TextBrewer", "TRL") if name in columns]
    ratios |= {f"{peer} / ours": columns[peer] / columns["as peer"] for peer in peers}
    return {
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratios": {name: ratio.median().item() for name, ratio in ratios.items()},
        "quartiles": {name: ratio.quantile(torch.tensor([0.25, 0.75])).tolist() for name, ratio in ratios.items()},
    }


def compare_values() -> dict[str, float]:
    """Relative differences between the peers' losses and ours."""
    generator = torch.Generator().manual_seed(0)
    own, other = (torch.randn(8, 12, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, 50, (8, 12), generator=generator)
    labels[:, 9:] = -100
    mask = labels != -100
    found = {}
    try:
        from textbrewer.losses import hid_mse_loss, kd_ce_loss

        whole = torch.ones(8, 12, dtype=torch.bool)
        total, count = kd_loss(own, other, whole, temperature=TEMPERATURE, temperature_squared=False)
        soft = (other / TEMPERATURE).softmax(-1)
        entropy = -(soft * soft.log()).sum(-1).mean()
        theirs = kd_ce_loss(own, other, TEMPERATURE)
        found["TextBrewer kd - entropy"] = ((total / count + entropy) / theirs - 1).abs().item()
        total, count = hidden_loss(own, other, mask)
        found["TextBrewer hidden"] = (total / count / hid_mse_loss(own, other, mask) - 1).abs().item()
    except ImportError as error:
        print(error)
    try:
        from trl.experimental.gkd import GKDTrainer

        for divergence, beta in (("forward", 0.0), ("reverse", 1.0), ("jsd", 0.3)):
            total, count = kd_loss(
                own,
                other,
                mask,
                temperature=TEMPERATURE,
                temperature_squared=False,
                divergence=divergence,
                beta=beta if divergence == "jsd" else 0.5,
            )
            theirs = GKDTrainer.generalized_jsd_loss(own, other, labels, beta=beta, temperature=TEMPERATURE)
            found[f"TRL {divergence}"] = (total / count / theirs - 1).abs().item()
    except ImportError as error:
        print(error)
    return found


class LiveCopies(TorchDispatchMode):
    """The most storages of at least `size` bytes that live at once."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.live, self.peak = size, {}, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if torch.is_tensor(tensor) and tensor.untyped_storage().nbytes() >= self.size:
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if key not in self.live:
                    self.live[key] = weakref.ref(storage, lambda _, key=key: self.live.pop(key, None))
        self.peak = max(self.peak, len(self.live))
        return result


def count_copies() -> dict[str, int]:
    """Of the logits of 4 x 256 tokens and 16,384 entries, beside student's and teacher's own."""
    shape = (4, 256, LLAMA["vocab_size"])
    mask = torch.ones(shape[:2], dtype=torch.bool)
    found = {}

    def peak(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> int:
        own, other = torch.randn(shape, requires_grad=True), torch.randn(shape)
        with LiveCopies(int(0.6 * own.nbytes)) as seen:
            seen.live |= {tensor.untyped_storage().data_ptr(): lambda: None for tensor in (own, other)}
            loss(own, other).backward()
        return seen.peak - 2

    for divergence in ("forward", "jsd"):
        found[f"ours, {divergence}"] = peak(
            lambda own, other, divergence=divergence: kd_loss(own, other, mask, divergence=divergence)[0]
        )
    try:
        from trl.experimental.gkd import GKDTrainer

        found["TRL, jsd"] = peak(
            lambda own, other: GKDTrainer.generalized_jsd_loss(own, other, mask.long(), beta=0.5, temperature=2.0)
        )
    except ImportError as error:
        print(error)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of timing (default: 15)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    disable_progress_bars()
    report: dict[str, Any] = {
        "benchmark": "distillation",
        "commit": package_commit(),
        "date": datetime.date.today().isoformat(),
        "environment": asdict(Environment.collect()),
        "threads": options.threads,
        "rounds": options.rounds,
        "load_average_at_start": list(os.getloadavg()),
        "values": compare_values(),
        "copies": count_copies(),
        "pairs": {},
    }
    print(report["values"], report["copies"], flush=True)
    rows = []
    with using_threads(options.threads):
        for name in SHAPES:
            with tempfile.TemporaryDirectory() as folder:
                report["pairs"][name] = found = measure(steps_of(name, folder), options.rounds)
            rows += [[name, ratio, f"{value:.3f}"] for ratio, value in found["ratios"].items()]
            print(found, flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        part = options.output.with_suffix(".part")
        part.write_text(json.dumps(report, indent=1) + "\n")
        part.replace(options.output)
    print(f"\n{markdown(['pair', 'ratio', 'median'], rows)}")


if __name__ == "__main__":
    main()
