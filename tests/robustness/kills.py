"""Kills at random moments: whatever a run is doing, the same command goes on and ends with the same weights.

    python -m tests.robustness.kills --kills 50 --seed 1

Half of the kills are SIGKILL, half SIGTERM. Each waits for one of the next two stages and falls at a random moment
after that begins; where none is to come, the run may end. Three jobs take turns: a text recipe and an image recipe
through all kinds of stages, and a distillation on two processes, of which one or both are killed. Every run that ends
is compared with an uninterrupted one, bit for bit, in all its stages. Runs are forks of this process, which has paid
for the imports.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

from hf_efficient import Recipe, compress
from hf_efficient.cli.programs import distill as script
from hf_efficient.data.tokenizer import train_tokenizer
from hf_efficient.io.disk import TEMPORARY

from .tiny import TINY

WORDS = ["good", "bad", "fine", "dull", "plot", "film", "actor", "scene", "story", "long", "short", "music", "dark"]
TRAINING = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3}
END = "the end"  # of a run: measuring, checking, publishing
PATIENCE = 300  # seconds after which a run is taken for hanging
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@dataclass(frozen=True)
class Job:
    """What is run again and again: `work(rank, folder)` in each process, and the stages that show in the folder."""

    name: str
    processes: int
    work: Callable[[int, Path], Any]
    stages: tuple[str, ...]
    is_begun: Callable[[Path, str], bool]
    is_finished: Callable[[Path], bool]


def recipe_job(name: str, content: dict[str, Any]) -> Job:
    recipe = Recipe.from_dict(content)
    stages = ("0-teacher", *(f"{number}-{stage.name}" for number, stage in enumerate(recipe.stages, 1)), END)

    def is_begun(folder: Path, stage: str) -> bool:
        if stage == END:
            return (folder / stages[-2]).is_dir()
        return (folder / f"{stage}.partial").is_dir() or (folder / stage).is_dir()

    return Job(
        name,
        1,
        lambda rank, folder: compress(recipe, output_dir=folder),
        stages,
        is_begun,
        lambda folder: (folder / "model").is_dir(),
    )


def texts_job(place: Path) -> Job:
    table, pick = place / "texts.csv", random.Random(0)
    rows = [(" ".join(pick.choices(WORDS[2:], k=8)) + " " + WORDS[n % 2], ("yes", "no")[n % 2]) for n in range(60)]
    table.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    stages = [
        {"attention": {"kind": "linear", "feature_map": "hedgehog", "transfer": {"max_steps": 8, "batch_size": 8}}},
        {"prune": {"ratio": 0.3, "round_to": 4, "calibration_samples": 8}},
        {"distill": {**TRAINING, "losses": {"kd": 1.0, "ce": 0.5}}},
        {"vocabulary": {}},
        {"quantize": {"method": "int8_dynamic"}},
    ]
    content = {
        "name": "texts",
        "task": "text-classification",
        "model": {"config": {"model_type": "bert", "max_position_embeddings": 32, **BERT}, "tokenizer_size": 300},
        "data": {"name_or_path": str(table), "max_length": 16},
        "teacher": TRAINING,
        "stages": stages,
        "measure": {"repeats": 2},
    }
    return recipe_job("texts", content)


def images_job() -> Job:
    gradual = {"prune": {"ratio": 0.3, "start": 0.1, "end": 0.8, "every": 1}}
    last = {"distill": {**TRAINING, "losses": {"kd": 1.0, "hidden": 0.1}, **gradual}}
    stages = [{"attention": {"kind": "local", "window": 2}}, *TINY["stages"], last, {"export": {"format": "torch"}}]
    return recipe_job("images", TINY | {"name": "images", "stages": stages})


def two_processes_job(place: Path) -> Job:
    """`scripts/distill.py`, resumed from its last whole checkpoint where there is one."""
    teacher, table = place / "teacher", place / "texts.csv"
    tokenizer = train_tokenizer([" ".join(WORDS)] * 4, 300, close=True)
    tokenizer.save_pretrained(teacher)
    torch.manual_seed(0)
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **BERT, **names)
    BertForSequenceClassification(config).save_pretrained(teacher)

    def work(rank: int, folder: Path) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ["KILLS_PORT"]}
        flags = {"teacher": teacher, "dataset": table, "output_dir": folder, "task": "text-classification"}
        flags |= {"student_layers": 1, "max_steps": 24, "save_steps": 2, "save_total_limit": 2, "max_length": 16}
        flags |= {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "optim": "adamw_torch"}
        flags |= {"losses": '{"kd": 1, "ce": 1, "hidden": 1}', "report_to": "none", "disable_tqdm": "true"}
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        again = ["--resume_from_checkpoint", "true"] if list(folder.glob("checkpoint-*/complete")) else ["--overwrite"]
        script.run(*script.read([*words, "--use_cpu", "--dataloader_pin_memory", "false", *again]))
        assert PartialState().num_processes == 2

    stages = tuple(f"checkpoint-{step}" for step in range(2, 25, 2))
    return Job(
        "two processes",
        2,
        work,
        stages,
        lambda folder, stage: any(_step(path.name) >= _step(stage) for path in folder.glob("checkpoint-*")),
        lambda folder: (folder / "all_results.json").is_file() and (folder / "model.safetensors").is_file(),
    )


def _step(name: str) -> int:
    return int(name.rpartition("-")[2])


class Running:
    """The processes of one attempt."""

    def __init__(self, job: Job, folder: Path, log: Path):
        self.folder, self.log, self.codes = folder, log, {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["KILLS_PORT"] = str(free.getsockname()[1])
        self.pids = [self._fork(job, rank) for rank in range(job.processes)]

    def _fork(self, job: Job, rank: int) -> int:
        sys.stdout.flush()
        if child := os.fork():
            return child
        code = 70
        try:
            os.setpgid(0, 0)
            tqdm.set_lock(threading.RLock())  # the one that forks share may be held by a process that was killed
            output = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            torch.set_num_threads(1)
            job.work(rank, self.folder)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def is_alive(self) -> bool:
        for pid in self.pids:
            if pid not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def end(self, number: int, pids: list[int]) -> None:
        """Send a signal to some; what the others wait for will not come, so they go a moment later."""
        for pid in pids:
            _send(pid, number)
        time.sleep(0.2)
        for pid in self.pids:
            _send(pid, signal.SIGKILL)
        while self.is_alive():
            time.sleep(0.01)

    def wait(self) -> None:
        end = time.monotonic() + PATIENCE
        while self.is_alive():
            if time.monotonic() > end:
                self.end(signal.SIGKILL, self.pids)
                raise SystemExit(f"A run hangs: see {self.log}")
            time.sleep(0.05)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)  # with what it has started itself


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all finished stages of a run."""
    unfinished = ("checkpoint-", ".partial", TEMPORARY)
    files = [path for path in folder.rglob("*.safetensors") if not any(part in str(path) for part in unfinished)]
    return {f"{path.relative_to(folder)}:{key}": value for path in files for key, value in load_file(path).items()}


def differences(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> list[str]:
    wrong = [name for name in expected if name not in got or not torch.equal(expected[name], got[name])]
    return wrong + [name for name in got if name not in expected]


def kill_one(job: Job, folder: Path, log: Path, pick: random.Random, length: float) -> str | None:
    """Start or continue a run and kill it in one of its next stages; None if it ended, or has none to come."""
    to_come = [stage for stage in job.stages if not job.is_begun(folder, stage)]
    if not to_come:
        return None
    running, stage = Running(job, folder, log), pick.choice(to_come[:2])
    end = time.monotonic() + PATIENCE
    while running.is_alive() and not job.is_begun(folder, stage) and time.monotonic() < end:
        time.sleep(0.002)
    moment = time.monotonic() + pick.uniform(0, length)
    while running.is_alive() and time.monotonic() < moment:
        time.sleep(0.002)
    if not running.is_alive():
        if any(running.codes.values()):
            raise SystemExit(f"A run of {job.name} failed: see {log}")
        return None
    now = next((each for each in reversed(job.stages) if job.is_begun(folder, each)), "the beginning")
    number = pick.choice([signal.SIGKILL, signal.SIGTERM])
    pids = running.pids if pick.random() < 0.5 else [pick.choice(running.pids)]
    running.end(number, pids)
    return f"{job.name:<14} {signal.Signals(number).name:<8} in {now}"


def run_whole(job: Job, folder: Path, log: Path) -> dict[str, torch.Tensor]:
    """Start or continue a run, let it end, and give its weights."""
    running = Running(job, folder, log)
    running.wait()
    if any(running.codes.values()) or not job.is_finished(folder):
        raise SystemExit(f"A run of {job.name} in {folder} failed: see {log}")
    return weights(folder)


def killed_until(kills: int, jobs: list[Job], place: Path, seed: int) -> int:
    """The number of runs that ended with other weights than the uninterrupted ones."""
    pick, log, wrong, count = random.Random(seed), place / "log.txt", 0, 0
    expected, lengths, runs = {}, {}, dict.fromkeys((job.name for job in jobs), 0)
    for job in jobs:
        start = time.monotonic()
        expected[job.name] = run_whole(job, place / f"straight {job.name}", log)
        lengths[job.name] = (time.monotonic() - start) / len(job.stages)
        print(f"{job.name}: uninterrupted, {len(expected[job.name])} tensors", flush=True)
    while jobs:
        for job in list(jobs):
            folder = place / f"{job.name} {runs[job.name]}"
            if count < kills and (told := kill_one(job, folder, log, pick, lengths[job.name])):
                count += 1
                print(f"{count:>3} {told}", flush=True)
                continue
            faults = differences(expected[job.name], run_whole(job, folder, log))
            wrong += bool(faults)
            runs[job.name] += 1
            print(f"    {job.name} ended: {'equal' if not faults else f'DIFFERENT {faults[:3]}'}", flush=True)
            if count >= kills:
                jobs.remove(job)
    print(f"{count} kills, {sum(runs.values())} runs ended, {wrong} with other weights than uninterrupted ones")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="kills-"))
    jobs = [texts_job(place), images_job(), two_processes_job(place)]
    wrong = killed_until(arguments.kills, jobs, place, arguments.seed)
    if not wrong:
        shutil.rmtree(place)
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
