"""What `scripts/*.py` and the commands of the same names do."""

from ..noise import silence

silence()  # before torch is imported
