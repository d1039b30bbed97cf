"""The folder of one run: a checkpoint folder for each finished stage, and nothing half-written.

    out/
      recipe.yaml            what was asked for; the same recipe continues this run, another one is refused
      inputs.json            what the recipe only names, as it was when the run began: rows and model files
      0-teacher/             checkpoint + stage.json
      1-attention/ ...
      2-prune.partial/       the stage that was running when the run stopped
      model/                 the result: checkpoint, card, plots, report

A stage writes into `<name>.partial`; its manifest is the last file written there, and then the folder gets its name.
The folder may come from a stranger: a link in it that leads elsewhere is refused, so nothing is read or written there.
"""

import errno
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import CheckpointError
from ..io.codec import decode
from ..io.disk import check_inside, check_name, inside, own_file, own_folder, remove_own, write_atomic
from ..io.json import read_json
from ..recipes.recipe import Recipe
from ..reporting.schema import StageRecord
from ..training.ranks import from_main, is_main, meet, on_main

MODEL = "model"
MANIFEST = "stage.json"
RECIPE = "recipe.yaml"
INPUTS = "inputs.json"
LOCK = ".lock"
MANIFEST_VERSION = 1


class Workspace:
    """The output folder of a recipe: new, or holding an unfinished run of the same recipe.

    Raises:
        CheckpointError: the folder holds something else, or the run of another recipe.
    """

    def __init__(self, folder: str | os.PathLike, recipe: Recipe):
        self.folder = check_name(folder)
        self.recipe = recipe
        self._lock: FileLock | None = None
        self._check()

    def _check(self) -> None:
        if self.folder.is_file():
            raise CheckpointError(f"{self.folder} is a file; give a folder for the output.")
        if not self.folder.is_dir() or not any(path.name != LOCK for path in self.folder.iterdir()):
            return
        recipe_file = inside(self.folder, RECIPE)
        if not recipe_file.is_file():
            raise CheckpointError(
                f"{self.folder} is not empty and not a run of hf-efficient. Choose another output folder, or empty it."
            )
        try:
            same = Recipe.from_yaml(recipe_file).fingerprint() == self.recipe.fingerprint()
        except ValueError as error:
            raise CheckpointError(f"{recipe_file} cannot be read: {error}") from error
        if not same:
            raise CheckpointError(
                f"{self.folder} holds the run of another recipe (see {recipe_file}). Choose another output folder; to "
                "continue that run, give exactly its recipe and overrides."
            )

    def open(self, inputs: dict[str, Any]) -> None:
        """Make the folder, lock it, and note what went in; from here on it belongs to this recipe and these inputs.

        Of several processes one does so, and writes for all.
        """
        on_main(lambda: self._open(inputs))

    def _open(self, inputs: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = taken_lock(self.folder)
        try:
            self._check()  # again: another process may have been here since
            note = inside(self.folder, INPUTS)
            if note.exists() and read_json(note) != inputs:
                raise CheckpointError(
                    f"The data or the model folder changed since the run in {self.folder} began (see {note}). Its "
                    "stages would not fit together: choose another output folder, or empty this one."
                )
            write_atomic(self.folder / RECIPE, self.recipe.to_yaml())
            write_atomic(note, json.dumps(inputs, indent=2) + "\n")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def stage(
        self, name: str, settings: dict[str, Any], work: Callable[[Path], dict[str, Any]]
    ) -> tuple[Path, StageRecord]:
        """The folder and record of a stage: read if it is finished, else made by `work(partial_folder) -> facts`."""
        target = inside(self.folder, name)
        check_inside(target)
        if from_main((target / MANIFEST).is_file):
            return target, _read_manifest(target / MANIFEST)
        if target.exists():
            raise CheckpointError(f"{target} has no {MANIFEST}. Delete the folder {target} to run this stage again.")
        partial = target.with_name(f"{name}.partial")
        on_main(lambda: own_folder(partial))
        start = time.perf_counter()
        facts = work(partial)
        meet()
        if not is_main():
            meet()  # for the end of the main process's work
            return target, _read_manifest(target / MANIFEST)
        record = StageRecord(
            name=name.split("-", 1)[-1], seconds=time.perf_counter() - start, settings=settings, facts=facts
        )
        manifest = {"schema_version": MANIFEST_VERSION, **asdict(record)}
        write_atomic(partial / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        _complete(partial, target)
        meet()
        return target, record

    def result(self, name: str, work: Callable[[Path], None]) -> Path:
        """A folder that is written once, in one step, and belongs to the user then."""
        target, partial = self.folder / name, self.folder / f"{name}.partial"

        def write() -> None:
            remove_own(partial)
            work(own_folder(partial))
            _complete(partial, target)

        on_main(write)
        return target


def taken_lock(folder: Path) -> FileLock:
    """The lock of a folder that exists, for this process from here on; CheckpointError if another one has it."""
    lock = FileLock(own_file(folder / LOCK))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(f"Another process is running in {folder}. Wait for it, or stop it.") from None
    return lock


def _complete(partial: Path, target: Path) -> None:
    """Give a finished folder its name.

    Weights may be read by whoever may read their folder; safetensors writes them for their owner alone.
    """
    mode = partial.stat().st_mode & 0o666
    for path in partial.rglob("*.safetensors"):
        path.chmod(mode)
    try:
        os.replace(partial, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise CheckpointError(
            f"{target} was made by something else while this run made its own, which is {partial}. Delete one of the "
            "two; then give the same command again."
        ) from error


def _read_manifest(path: Path) -> StageRecord:
    try:
        data = read_json(path)
        if data.pop("schema_version") != MANIFEST_VERSION:
            raise ValueError("another schema_version")
        return decode(StageRecord, data, str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # CheckpointError is an OSError
        raise CheckpointError(
            f"{path} is damaged ({error}). Delete the folder {path.parent} to run this stage again."
        ) from error
