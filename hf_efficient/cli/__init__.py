"""The command line, `hf-efficient COMMAND`. Each command is a thin call of the library.

    hf-efficient compress bbc-news --prune.ratio 0.5 --output-dir out/half
    hf-efficient report out/half --json

Heavy imports stand inside the commands, so that `--help` answers at once. Exit codes: 0; 1 for an error that the user
can mend, told in one message (`--debug` shows where it arose); 2 for a command line that cannot be read; 130 after
ctrl-C. Anything else is a defect and shows its traceback.
"""

from . import deliver, exact, run, show
from .base import app, main
from .overrides import parse_overrides

__all__ = ["app", "deliver", "exact", "main", "parse_overrides", "run", "show"]
