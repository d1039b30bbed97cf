"""Makes transformers' Auto classes know the efficient ones, without importing transformers or torch first.

Importing `hf_efficient` must be cheap and must make `AutoModel.from_pretrained` work. `AutoConfig` finds its classes
by name in a lazy table; the names of the efficient configs go into it as soon as transformers has made it. A config
registers the model classes of its family when it is first made (`models.configs`): nothing is built before its time.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder

AUTO = "transformers.models.auto.configuration_auto"


def _register() -> None:
    from . import models

    table = sys.modules[AUTO].CONFIG_MAPPING
    for model_type, name in models.CONFIG_NAMES.items():
        table._mapping[model_type] = name
        table._modules[model_type] = models


class _AfterImport(MetaPathFinder):
    """Finds `AUTO` as Python would, and registers once it has run."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        run = spec.loader.exec_module

        def run_and_register(module):
            run(module)
            _register()

        spec.loader.exec_module = run_and_register
        return spec


def register_when_needed() -> None:
    """Register now if transformers' Auto classes are there already, else as soon as they are."""
    if AUTO in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())
