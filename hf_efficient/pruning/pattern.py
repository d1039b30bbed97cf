"""What is peculiar to single weights in a `PruningConfig`: a pattern of zeros, and importances of one matrix.

pattern = Pattern.read("2:4")        # of every 4 consecutive inputs 2 stay
pattern.zeros                        # 0.5
"""

import re
from typing import NamedTuple

from ..errors import ConfigError, shown
from .methods import OF_ONE_MATRIX

MAX_GROUP = 32  # the largest m


class Pattern(NamedTuple):
    """Of every `m` consecutive inputs in every row, `n` stay."""

    n: int
    m: int

    @classmethod
    def read(cls, text: object) -> "Pattern":
        """ConfigError unless it is `'n:m'` with 0 < n < m <= 32."""
        match = re.fullmatch(r"(\d{1,2}):(\d{1,2})", text) if isinstance(text, str) else None
        n, m = (int(number) for number in match.groups()) if match else (0, 0)
        if not 0 < n < m <= MAX_GROUP:
            raise ConfigError(
                f"mask_structure must be 'n:m' with 0 < n < m <= {MAX_GROUP}, got {shown(text)}. '2:4' keeps 2 of "
                "every 4 consecutive inputs."
            )
        return cls(n, m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def zeros(self) -> float:
        """The fraction of the weights that become zero."""
        return 1 - self.n / self.m

    def check(self, ratio: float, rest: tuple[str, ...], steps: int, round_to: int) -> None:
        """ConfigError for another ratio than the pattern's, several steps, or neurons in other multiples; `rest` is
        what leaves beside single weights."""
        if not rest and abs(ratio - self.zeros) > 1e-6:
            raise ConfigError(
                f"mask_structure='{self}' makes the fraction {self.zeros:.4g} of the weights zero, got ratio={ratio}. "
                "Set that, or leave it out."
            )
        if rest and ratio <= self.zeros:
            raise ConfigError(
                f"mask_structure='{self}' alone makes the fraction {self.zeros:.4g} of the weights zero, so with "
                f"{list(rest)} ratio must be more than that, got {ratio}."
            )
        if steps > 1:
            raise ConfigError(
                f"mask_structure='{self}' is reached in one step, got steps={steps}. Leave steps out; prune units "
                "before, by a call of their own."
            )
        if "neuron" in rest and round_to % self.m:
            raise ConfigError(
                f"mask_structure='{self}' needs neurons in multiples of {self.m}, got round_to={round_to}."
            )


def check_weight_importance(importance: str, reconstruct: bool, across_matrices: bool) -> None:
    """ConfigError if it cannot do what is asked for; `across_matrices`: weights of different ones are compared."""
    if importance == "obs" and not reconstruct:
        raise ConfigError(
            "importance='obs' chooses and updates weights together, so reconstruct=False cannot be honoured. "
            "Leave it out, or choose importance='activation'."
        )
    if importance in OF_ONE_MATRIX and across_matrices:
        raise ConfigError(
            f"importance={importance!r} compares the weights of one matrix, so allocation='global' cannot be "
            "honoured. Set allocation='uniform'."
        )
