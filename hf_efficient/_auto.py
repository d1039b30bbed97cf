"""Makes other packages' tables know the efficient classes, without importing those packages first.

Importing `hf_efficient` must be cheap and must make `AutoModel.from_pretrained` work. `AutoConfig` finds its classes
by name in a lazy table; the names of the efficient configs go into it as soon as transformers has made it. A config
registers the model classes of its family when it is first made (`models.classes`): nothing is built before its time.

PEFT knows by model type which linears to adapt; an efficient model has the linears of its stock model.
"""

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType


def _register_configs(auto: ModuleType) -> None:
    from . import models

    for model_type, name in models.CONFIG_NAMES.items():
        auto.CONFIG_MAPPING._mapping[model_type] = name
        auto.CONFIG_MAPPING._modules[auto.model_type_to_module_name(model_type)] = models


def _register_targets(constants: ModuleType) -> None:
    from .models.families import EFFICIENT_PREFIX, FAMILIES

    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            table.update({EFFICIENT_PREFIX + family: table[family] for family in FAMILIES if family in table})


TABLES: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_configs,
    "peft.utils.constants": _register_targets,
}


class _AfterImport:
    """Finds one module as Python would, and registers in it once it has run."""

    def __init__(self, name: str, register: Callable[[ModuleType], None]):
        self.name, self.register = name, register

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        run = spec.loader.exec_module

        def run_and_register(module):
            run(module)
            self.register(module)

        spec.loader.exec_module = run_and_register
        return spec


def register_when_needed() -> None:
    """Register now in the modules that are there already, and in the others as soon as they are."""
    for name, register in TABLES.items():
        if name in sys.modules:
            register(sys.modules[name])
        else:
            sys.meta_path.insert(0, _AfterImport(name, register))
