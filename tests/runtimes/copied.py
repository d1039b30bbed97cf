"""A program that was exported already, in the place of another export: for what `export` does around the exporter."""

import shutil
from pathlib import Path
from typing import Any

from hf_efficient.runtimes.formats import Exporter


class Copied(Exporter):
    """`monkeypatch.setitem(FORMATS, "torch", Copied(folder))`: `folder` is what every export as torch writes."""

    def __init__(self, folder: Path):
        super().__init__("torch", ("torch",), "torch", backend="dynamo")
        object.__setattr__(self, "folder", folder)

    def write(self, model: Any, example: Any, shapes: Any, quantize: Any, folder: Path) -> None:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
