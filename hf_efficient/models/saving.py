"""How an efficient checkpoint travels: the loader file beside the weights.

A *portable* checkpoint is a stock one. A *plugin* checkpoint has its own `model_type`; it loads after
`import hf_efficient`, or with `trust_remote_code=True` through the file written here, which only imports the installed
package. A model whose own code came with its checkpoint takes that code along: it loads by trust alone.
"""

import os
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path

from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from ..io.disk import write_atomic

LOADER = "modeling_hf_efficient"
REMOTE = '''"""Loads this checkpoint with `trust_remote_code=True`, and the code of the model beside this file.

It needs the package: pip install hf_efficient
"""

from hf_efficient.models.classes import remote_class

{imports}

STOCK = {{{names}}}


def __getattr__(name):
    return remote_class(name, STOCK)
'''


def write_loader(folder: str | os.PathLike, stock: Mapping[str, type] | None = None) -> Path:
    """Write the loader into a checkpoint folder, atomically; returns its path.

    Parameters:
        stock: the stock classes by the names of their Auto classes; the code of those that came with a checkpoint is
            copied too.
    """
    target = Path(folder) / f"{LOADER}.py"
    target.parent.mkdir(parents=True, exist_ok=True)
    if stock and any(is_remote(one) for one in stock.values()):
        return write_atomic(target, _remote_loader(stock, target.parent).encode())
    with as_file(files("hf_efficient.models") / "templates" / f"{LOADER}.py") as source:
        return write_atomic(target, source.read_bytes())


def is_remote(stock: type) -> bool:
    """True for a class whose code came with a checkpoint, and was loaded by `trust_remote_code=True`."""
    return stock.__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")


def _remote_loader(stock: Mapping[str, type], folder: Path) -> str:
    imports = set()
    for one in stock.values():
        module = one.__module__
        if is_remote(one):
            custom_object_save(one, folder)  # its file, and those that it imports from beside it
            module = f".{module.rpartition('.')[2]}"
        imports.add(f"from {module} import {one.__name__}")
    names = ", ".join(f'"{auto}": {one.__name__}' for auto, one in sorted(stock.items()))
    return REMOTE.format(imports="\n".join(sorted(imports)), names=names)
