"""What a recipe aims at instead of a ratio: the smallest model that loses no more than that.

# in a recipe; the prune stage's ratio is the most that is tried
target: {quality_loss: 1.0}

`pipeline.search` looks for it; what it finds is an ordinary recipe, `found(recipe, 0.62)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError
from ..stages.prune import PruneStage
from ..stages.settings import Settings, integer, number

HELD_OUT = 0.1  # of the training rows, where the recipe does not say how many


@dataclass(frozen=True)
class Target(Settings):
    """Against the teacher, on rows that are held out of the training rows.

    Parameters:
        quality_loss: at most so much is lost in the main score: points of a percentage, else units of the score.
        tries: at most so many ratios are carried out to their end; each costs the stages after the pruning once more.
    """

    quality_loss: float = number(1.0, 0, 1e6)
    tries: int = integer(3, 1, 20)

    def check(self, steps: Sequence[Any]) -> None:
        """ConfigError unless one stage says what is pruned in one go."""
        stages = [step.settings for step in steps if step.settings.pruning is not None]
        if len(stages) != 1 or not isinstance(stages[0], PruneStage):
            raise ConfigError(
                f"target looks for the ratio of one prune stage, and {len(stages)} stages prune here: leave one, "
                "and no `prune:` in a distill stage."
            )
        if "weight" in stages[0].config.granularity:
            raise ConfigError("target looks for a smaller model, and zeros (granularity weight) change no size.")


def place_of(recipe: Any) -> int:
    """Which of the stages prunes."""
    return next(n for n, step in enumerate(recipe.stages) if step.settings.pruning is not None)


def found(recipe: Any, ratio: float) -> Any:
    """The `Recipe` that does at once what the search found; the same rows are held out."""
    data = replace(recipe.data, validation_fraction=recipe.held_out)
    place = place_of(recipe)
    return replace(recipe, target=None, data=data).with_overrides({f"stages.{place}.ratio": ratio})
