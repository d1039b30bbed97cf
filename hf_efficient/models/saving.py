"""How an efficient checkpoint travels: the loader file beside the weights.

A *portable* checkpoint is a stock one. A *plugin* checkpoint has its own `model_type`; it loads after
`import hf_efficient`, or with `trust_remote_code=True` through the file written here, which only imports the installed
package.
"""

import os
from importlib.resources import as_file, files
from pathlib import Path

from ..io.disk import write_atomic

LOADER = "modeling_hf_efficient"


def write_loader(folder: str | os.PathLike) -> Path:
    """Copy the loader into a checkpoint folder, atomically; returns its path."""
    target = Path(folder) / f"{LOADER}.py"
    target.parent.mkdir(parents=True, exist_ok=True)
    with as_file(files("hf_efficient.models") / "templates" / f"{LOADER}.py") as source:
        return write_atomic(target, source.read_bytes())
