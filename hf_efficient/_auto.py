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
    from .models.registry import EFFICIENT_PREFIX

    for stock_type, stock_name in list(auto.CONFIG_MAPPING_NAMES.items()):
        model_type = EFFICIENT_PREFIX + stock_type
        auto.CONFIG_MAPPING._mapping[model_type] = f"Efficient{stock_name}"
        auto.CONFIG_MAPPING._modules[auto.model_type_to_module_name(model_type)] = models
    auto.CONFIG_MAPPING._extra_content = _WithEfficient(auto.CONFIG_MAPPING._extra_content)


class _WithEfficient(dict):
    """The configs that `AutoConfig.register` was given, and the efficient one of each."""

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or super().__contains__(_stock_type(model_type))

    def __missing__(self, model_type: str) -> type:
        from .models.classes import efficient_config_class

        return efficient_config_class(dict.__getitem__(self, _stock_type(model_type)))


def _stock_type(model_type: object) -> str | None:
    """`bert` of `efficient_bert`; None for any other type."""
    from .models.registry import EFFICIENT_PREFIX

    name = str(model_type)
    return name.removeprefix(EFFICIENT_PREFIX) if name.startswith(EFFICIENT_PREFIX) else None


def _register_targets(constants: ModuleType) -> None:
    from .models.registry import EFFICIENT_PREFIX

    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            table.update({EFFICIENT_PREFIX + stock_type: targets for stock_type, targets in table.items()})


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
