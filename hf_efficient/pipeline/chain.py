"""Stage after stage, each reading what the one before it wrote.

end = carry(run, space, Chain(run.folder, run), recipe.folders, announce)
end.source, end.records                 # the last checkpoint, and what the report says of each stage
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reporting.schema import StageRecord
from ..stages.base import Stage
from ..training.ranks import on_main
from .workspace import Workspace

if TYPE_CHECKING:
    from .run import Run


@dataclass(frozen=True)
class Chain:
    """How far it is: the newest checkpoint, the run with its tokenizer, the records of all stages, and what was made
    beside the model, with what the report says of it."""

    source: Path
    reader: "Run"
    records: tuple[StageRecord, ...] = ()
    exports: tuple[tuple[Path, dict[str, Any]], ...] = ()


def carry(
    run: "Run", space: Workspace, chain: Chain, stages: Mapping[str, Stage], announce: Callable[[str], None]
) -> Chain:
    """These stages, by their folders, after those of the chain; finished ones are read."""
    from transformers import set_seed

    from ..measurement.energy import with_energy

    recipe, source, reader = run.recipe, chain.source, chain.reader
    records, exports = list(chain.records), list(chain.exports)
    for name, stage in stages.items():
        announce(f"{name} ...")
        set_seed(recipe.seed)  # a stage draws the same whatever ran before it in this process
        work = stage.run if stage.is_shared else partial(_by_main, stage)
        tracked = with_energy(work, recipe.measure.country) if recipe.measure.energy else work
        folder, record = space.stage(name, stage.to_dict(), partial(tracked, reader, source))
        records.append(record)
        if stage.new_tokenizer:
            reader = run.read_as(folder)
        if stage.beside is None:
            source = folder
        else:
            exports.append((folder / stage.beside, record.facts))
        announce(f"{name} done in {record.seconds:.0f} s")
    return Chain(source, reader, tuple(records), tuple(exports))


def _by_main(stage: Stage, *arguments: Any) -> dict[str, Any]:
    """A stage that one process does by itself."""
    return on_main(lambda: stage.run(*arguments)) or {}
