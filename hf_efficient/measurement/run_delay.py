"""How long this process stood ready and had no core, as Linux counts it: other work on the machine.

before = run_delay()
model(**inputs)
waited = run_delay() - before                            # seconds, of all threads together
"""

from pathlib import Path

TASKS = Path("/proc/self/task")


def run_delay() -> float | None:
    """Seconds since the process began; None where the system does not say (other systems, some containers)."""
    if not TASKS.is_dir():
        return None
    total = 0
    for task in TASKS.iterdir():
        try:
            _, waited, _ = (task / "schedstat").read_text().split()
            total += int(waited)
        except (FileNotFoundError, ProcessLookupError):
            if task.is_dir():  # no thread that ended meanwhile: this system does not count
                return None
        except (OSError, ValueError):
            return None
    return total / 1e9
