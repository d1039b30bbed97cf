"""What a result must reach: the gate of a recipe and of `hf-efficient measure`.

# in a recipe
require: {quality_loss: 1.0, speedup: 4.0, size: 0.25, agreement: 0.97}

Requirements(speedup=4.0).misses(comparison)          # ["speedup is 3.1x, less than 4x"]
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, RequirementError
from ..stages.settings import Settings, keys_of, number

if TYPE_CHECKING:
    from ..reporting.schema import Comparison, Score


@dataclass(frozen=True)
class Requirements(Settings):
    """Each against the teacher, as the report says it; what is not named is not asked for.

    Parameters:
        quality_loss: at most so much is lost in the main score: points of a percentage, else units of the score.
        speedup: teacher time over student time is at least that, of the timed forward.
        size: at most this fraction of the teacher's weight bytes.
        agreement: at least this fraction of the targets gets the same prediction.
        similarity: of embeddings, at least this correlation (Spearman) of the cosines of texts.
    """

    quality_loss: float | None = number(None, 0, 1e6, optional=True)
    speedup: float | None = number(None, 0, 1e6, above=True, optional=True)
    size: float | None = number(None, 0, 1, above=True, optional=True)
    agreement: float | None = number(None, 0, 1, optional=True)
    similarity: float | None = number(None, 0, 1, optional=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.to_dict():
            raise ConfigError(f"nothing is asked for. Give one or more of {', '.join(keys_of(self))}.")

    def to_dict(self) -> dict[str, Any]:
        """What is asked for."""
        return {name: value for name, value in super().to_dict().items() if value is not None}

    def misses(self, compared: "Comparison", score: "Score | None" = None) -> list[str]:
        """One line for each that is not reached. What was not measured, or is no number, is not reached.

        `score`: the student's main score, for which way is better.
        """
        from ..reporting.numbers import format_ratio, is_fraction, scale_of

        lines = []
        if self.quality_loss is not None:
            change = compared.quality_difference
            if score is None or change is None:
                lines.append("quality_loss was not measured: it needs data with labels")
            elif (
                not (lost := scale_of(score.name) * change * (-1 if score.higher_is_better else 1))
                <= self.quality_loss
            ):
                unit = "points" if is_fraction(score.name) else f"of {score.name}"
                lines.append(f"quality_loss is {lost:.3g} {unit}, more than {self.quality_loss:g}")
        if self.speedup is not None and not compared.speedup >= self.speedup:
            lines.append(f"speedup is {format_ratio(compared.speedup)}, less than {self.speedup:g}x")
        if self.size is not None and not compared.weight_bytes_ratio <= self.size:
            lines.append(f"size is {compared.weight_bytes_ratio:.3g} of the teacher, more than {self.size:g}")
        if self.agreement is not None:
            if compared.agreement is None:
                lines.append("agreement was not measured: it needs data, and both models must read the same tokens")
            elif not compared.agreement >= self.agreement:
                lines.append(f"agreement is {compared.agreement:.3g}, less than {self.agreement:g}")
        if self.similarity is not None:
            if compared.similarity is None:
                lines.append("similarity was not measured: it is that of sentence-embeddings, and needs data")
            elif not compared.similarity >= self.similarity:
                lines.append(f"similarity is {compared.similarity:.4g}, less than {self.similarity:g}")
        return lines

    def check(self, compared: "Comparison", score: "Score | None" = None) -> None:
        """RequirementError, which lists what is not reached."""
        if misses := self.misses(compared, score):
            raise RequirementError(misses)
