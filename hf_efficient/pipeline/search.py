"""The smallest model that stays within a loss: the search behind `target:` of a recipe.

    out/
      0-teacher/ ...           the stages before the pruning, made once
      target.json              how far pruning goes without training, and each try: its ratio and what it lost
      tries/ratio=0.62/        the stages from the pruning on, for one ratio
      2-prune/ 3-distill/      those of the ratio that was chosen, and then as in every run

Decided on rows that are held out of the training rows; the test rows only say in the report what came out.

1. Without training: the model is scored once, cut at several ratios and asked (bisection), which takes minutes.
2. Where stages after the pruning train, they win back a part: ratios above that are carried out and asked, half-way
   between what held and what did not, `tries` of them. Else the ratio of step 1 is.
3. Where none held, the ratio of step 1 and then smaller ones are.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, RequirementError
from ..io.disk import copy_folder, inside, new_folder, write_atomic
from ..io.json import read_json
from ..recipes.target import Target, found, place_of
from ..training.ranks import from_main, on_main
from .chain import Chain, carry
from .workspace import MANIFEST, Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .run import Run

NOTE = "target.json"
TRIES = "tries"
HALVINGS = 5  # of the largest ratio, without training
STEPS_BACK = 3  # after `tries` that all lost too much
Tries = list[tuple[float, float]]  # ratio, loss


def next_ratio(most: float, free: float, tries: Sequence[tuple[float, float]], target: Target, trains: bool) -> float:
    """The ratio to try next; 0 where the search is at its end.

    Parameters:
        most: the largest that is allowed.
        free: the largest that holds without training; 0: none.
        tries: (ratio, loss) of those that were carried out.
        trains: whether something after the pruning wins back what it loses.
    """
    held = [ratio for ratio, loss in tries if loss <= target.quality_loss]
    missed = [ratio for ratio, loss in tries if not loss <= target.quality_loss]
    high = min(missed, default=most)
    low = max((ratio for ratio in (free, *held) if ratio < high), default=0.0)
    if not tries:
        first = (free + most) / 2 if trains and free < most else free or most / 2
        return round(first, 3)
    if held and (not trains or len(tries) >= target.tries or high - max(held) < 0.03 * most):
        return 0.0
    if not held and len(tries) >= target.tries + STEPS_BACK:
        return 0.0
    late = not held and (not trains or len(tries) >= target.tries)
    tried = {ratio for ratio, _ in tries}
    back = free if 0 < free < high and round(free, 3) not in tried else high / 2
    return round(back if late else (low + high) / 2, 3)


def search(run: "Run", space: Workspace, announce: Callable[[str], None]) -> "tuple[Run, str]":
    """The run of the ratio that was found, whose stages are finished, and a sentence for the report."""
    from .run import Run

    recipe, target = run.recipe, run.recipe.target
    assert target is not None
    place = place_of(recipe)
    before = dict(list(recipe.folders.items())[: place + 1])  # the teacher stands before the first
    chain = carry(run, space, Chain(run.folder, run), before, announce)
    judge, known = _Judge(run, chain), from_main(lambda: _known(space.folder))
    most = recipe.stages[place].settings.pruning.ratio
    if known["free"] is None:
        announce("how far pruning goes without training ...")
        known["free"] = from_main(lambda: _without_training(judge, most, announce))
        on_main(lambda: _note(space.folder, known))
    trains = any(step.settings.training is not None for step in recipe.stages[place + 1 :])
    while ratio := next_ratio(most, known["free"], known["tries"], target, trains):
        announce(f"try ratio {ratio:g} ...")
        loss = judge.loss(_carried_out(run, space, chain, ratio, announce))
        announce(f"ratio {ratio:g} loses {loss:.3g} on {judge.rows} held-out rows")
        known["tries"].append([ratio, loss])
        on_main(lambda: _note(space.folder, known))
    held = [ratio for ratio, loss in known["tries"] if loss <= target.quality_loss]
    best = max(held) if held else min(known["tries"], key=lambda pair: pair[1])[0]
    known["missed"] = "" if held else _miss(target, known["tries"])
    on_main(lambda: _note(space.folder, known))
    on_main(lambda: _take(space.folder, best, list(found(recipe, best).folders)[place + 1 :]))
    return Run(found(recipe, best), run.folder), _told(target, known, best, judge)


def check_target(folder: Path) -> None:
    """RequirementError if no ratio of a search that has ended held."""
    if missed := from_main(lambda: _known(folder)["missed"]):
        raise RequirementError([missed])


class _Judge:
    """What models lose to the teacher on the rows that are held out. Made by all processes together."""

    def __init__(self, run: "Run", chain: Chain):
        self.run, self.chain = run, chain
        self.teacher = self._evaluated(run.load(run.teacher_folder), run)

    @property
    def rows(self) -> int:
        return self.teacher.quality.samples

    def loss(self, chain: Chain, model: "PreTrainedModel | None" = None) -> float:
        """In the main score: points of a percentage, else units of the score."""
        from ..measurement.quality import compare_quality
        from ..reporting.numbers import scale_of

        student = self._evaluated(self.run.load(chain.source) if model is None else model, chain.reader)
        score, change = student.quality.main, compare_quality(self.teacher, student).difference
        return -scale_of(score.name) * change * (1 if score.higher_is_better else -1)

    def _evaluated(self, model: "PreTrainedModel", reader: "Run") -> Any:
        from ..measurement.quality import evaluate_quality

        data = reader.validation(config=model.config)
        return evaluate_quality(model, data.test, data.collator, self.run.recipe.task, pooling=self.run.pooling)


def _without_training(judge: _Judge, most: float, announce: Callable[[str], None]) -> float:
    """The largest ratio that loses no more than allowed right after it was cut; 0: none does, or a model that is read
    layer by layer."""
    from ..pruning.prune import search as scored
    from ..stages.prune import calibration_batches, is_by_layer

    run, chain, target = judge.run, judge.chain, judge.run.recipe.target
    stage: Any = run.recipe.stages[place_of(run.recipe)].settings
    assert target is not None
    if is_by_layer(stage.calibration.layer_by_layer, chain.source):
        return 0.0
    model = run.load(chain.source)
    data = chain.reader.data(config=model.config)
    batches = calibration_batches(model, data, stage.calibration, run.recipe.seed)
    one = scored(model, replace(stage.config, ratio=most), batches)  # the dense model is scored once

    def holds(ratio: float) -> bool:
        other = one.at(ratio)
        loss = judge.loss(chain, other.cutter.cut(other.plan()).model)
        announce(f"without training, ratio {ratio:.3g} loses {loss:.3g}")
        return loss <= target.quality_loss

    if holds(most):
        return most
    low, high = 0.0, most
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return round(low, 3)


def _folder(folder: Path, ratio: float) -> Path:
    return inside(folder, TRIES) / f"ratio={ratio:g}"


def _carried_out(run: "Run", space: Workspace, chain: Chain, ratio: float, announce: Callable[[str], None]) -> Chain:
    """The stages from the pruning on, but what is made beside the model."""
    recipe = found(run.recipe, ratio)
    after = list(recipe.folders.items())[place_of(recipe) + 1 :]
    own = Workspace(_folder(space.folder, ratio), recipe)
    own.open(run.inputs())
    try:
        return carry(run, own, chain, {name: stage for name, stage in after if stage.beside is None}, announce)
    finally:
        own.close()


def _take(folder: Path, ratio: float, names: Sequence[str]) -> None:
    """Give the run the stages of the ratio that was chosen."""
    for name in names:
        source, target = inside(_folder(folder, ratio), name), inside(folder, name)
        if (source / MANIFEST).is_file() and not target.exists():
            with new_folder(target) as new:
                copy_folder(source, new)


def _known(folder: Path) -> dict[str, Any]:
    """What an earlier call found."""
    path = inside(folder, NOTE)
    if not path.is_file():
        return {"free": None, "tries": [], "missed": ""}
    known = read_json(path)
    try:
        tries = [[float(ratio), float(loss)] for ratio, loss in known["tries"]]
        return {"free": float(known["free"]), "tries": tries, "missed": str(known["missed"])}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Delete it: finished tries are kept.") from error


def _note(folder: Path, known: dict[str, Any]) -> None:
    write_atomic(folder / NOTE, json.dumps(known, indent=1) + "\n")


def _miss(target: Target, tries: Tries) -> str:
    ratio, loss = min(tries, key=lambda pair: pair[1])
    return f"target: the least that was lost is {loss:.3g} at ratio {ratio:g}, more than {target.quality_loss:g}"


def _told(target: Target, known: dict[str, Any], best: float, judge: _Judge) -> str:
    tries = ", ".join(f"{ratio:g} lost {loss:.2g}" for ratio, loss in known["tries"])
    result = "missed by all of them" if known["missed"] else f"ratio {best:g} was taken"
    return (
        f"The ratio was searched for: at most {target.quality_loss:g} lost in {judge.teacher.quality.main.name} on "
        f"{judge.rows} held-out training rows. Without training it went to {known['free']:g}; carried out, {tries}: "
        f"{result}."
    )
