"""Modules that stood elsewhere in version 0.1 and were imported from there: the old names give them still.

from hf_efficient.bundled import bundled_model      # hf_efficient.data.bundled, with a DeprecationWarning
"""

import importlib
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Only what the documentation named, or what programs around the package are known to import.
# `runners` gives what it became, the table of stages, without the functions that it had.
MOVED = {
    "attention.convert": "conversion.convert",
    "attention.transfer": "distillation.transfer",
    "bundled": "data.bundled",
    "exporting": "runtimes.export",
    "families": "models.registry",
    "loading": "models.loading",
    "models.building": "models.rebuild",
    "pruning.latency": "pruning.price.latency",
    "pruning.zeros": "pruning.gradual.zeros",
    "quantization": "runtimes.quantization",
    "recipe": "recipes.recipe",
    "runners": "stages.table",
    "verify": "pipeline.verify",
}


class _Moved:
    """Gives the module that has another name now."""

    def __init__(self, new: str):
        self.new = new

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(f"{spec.name} is now {self.new}. The old name will go.", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(self.new)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import has just written the old name over it


class _OldNames:
    """Asked last, so a module that is really there wins."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package == __package__ and name in MOVED:
            return ModuleSpec(fullname, _Moved(f"{package}.{MOVED[name]}"))
        return None


def keep_old_names() -> None:
    """Let the old names be found."""
    sys.meta_path.append(_OldNames())
