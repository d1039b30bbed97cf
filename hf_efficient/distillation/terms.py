"""The table of losses: what each name compares of both models, where, and what must be there for it.

    LOSSES["kd"].masks(batch)                              # {"kd": where it counts}
    LOSSES["kd"].sums(batch, student, teacher, settings)   # {"kd": the sum there}

    register_loss(OutputLoss("margin", mask=Batch.soft_mask, total=margin))     # now losses={"margin": 1} trains on it

The functions of the table are named by their paths and imported when they are called, so that names are listed, and
the losses of a recipe checked, without torch. A mask is both what a loss sums over and what it is divided by: the
`mask.sum()` of a whole optimizer step.
"""

from collections.abc import Callable, Collection
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..io.lazy import load

if TYPE_CHECKING:
    from torch import Tensor

    from ..training.batch import Batch
    from .answers import Answer

STACKS = ("encoder", "decoder")
COMPARED = ("logits", "embeddings", "states", "attentions")


@dataclass(frozen=True)
class Loss:
    """One name of the table; see `OutputLoss` and `LayerLoss`.

    compares: `logits` (of models with a head), `embeddings` (of models without one), `states` (hidden states of mapped
        layers) or `attentions` (queries, keys, values and outputs of mapped layers).
    projects_outputs: of `attentions`, whether outputs are compared in the teacher's width. States always are.
    """

    name: str
    _: KW_ONLY
    compares: str
    needs_teacher: bool = True
    projects_outputs: bool = False

    @property
    def needs_head(self) -> bool:
        return self.compares == "logits"

    @property
    def needs_attentions(self) -> bool:
        return self.compares == "attentions"

    @property
    def needs_states(self) -> bool:
        return self.compares == "states"

    @property
    def maps_layers(self) -> bool:
        return self.needs_states or self.needs_attentions

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of what is summed apart, each with its own denominator."""
        raise NotImplementedError

    def masks(self, batch: "Batch") -> "dict[str, Tensor]":
        """What counts in a batch, by part."""
        raise NotImplementedError

    def sums(self, batch: "Batch", student: "Answer", teacher: "Answer | None", settings: Any) -> "dict[str, Tensor]":
        """The sum of each part."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class OutputLoss(Loss):
    """What compares the outputs of the models, in one part.

    mask: where it counts, of a batch: `[batch, ...]`, bool.
    total: the sum there, of (batch, student's answer, teacher's answer, settings): `[]`, connected to the graph.
    Both are functions, or the paths of functions.
    """

    compares: str = "logits"
    mask: Callable[..., Any] | str
    total: Callable[..., Any] | str

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.name,)

    def masks(self, batch: "Batch") -> "dict[str, Tensor]":
        return {self.name: _function(self.mask)(batch)}

    def sums(self, batch: "Batch", student: "Answer", teacher: "Answer | None", settings: Any) -> "dict[str, Tensor]":
        return {self.name: _function(self.total)(batch, student, teacher, settings)}


@dataclass(frozen=True, kw_only=True)
class LayerLoss(Loss):
    """What compares mapped layers, pair by pair: one part for each stack, over its real tokens.

    compare: the sum over one pair of layers, of a `sums.Compared`; a function, or the path of one.
    """

    compares: str = "states"
    compare: Callable[..., Any] | str

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(f"{self.name}_{stack}" for stack in STACKS)

    def masks(self, batch: "Batch") -> "dict[str, Tensor]":
        return {f"{self.name}_{stack}": mask for stack, mask in batch.token_masks().items()}

    def sums(self, batch: "Batch", student: "Answer", teacher: "Answer | None", settings: Any) -> "dict[str, Tensor]":
        return load("distillation.sums:sums_of_layers")(
            self.name, _function(self.compare), batch, student, teacher, settings
        )


def _function(entry: Callable[..., Any] | str) -> Callable[..., Any]:
    return load(entry) if isinstance(entry, str) else entry


_BATCH = "training.batch:Batch"

LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        OutputLoss("ce", mask=f"{_BATCH}.label_mask", total="distillation.sums:ce", needs_teacher=False),
        OutputLoss("kd", mask=f"{_BATCH}.soft_mask", total="distillation.sums:kd"),
        LayerLoss("hidden", compare="distillation.sums:hidden"),
        LayerLoss("attention", compares="attentions", compare="distillation.sums:attention"),
        LayerLoss("relation", compares="attentions", compare="distillation.sums:relation"),
        LayerLoss(
            "attention_output",
            compares="attentions",
            compare="distillation.sums:attention_output",
            projects_outputs=True,
        ),
        OutputLoss(
            "embedding", compares="embeddings", mask=f"{_BATCH}.example_mask", total="distillation.sums:embedding"
        ),
    )
}


def register_loss(loss: Loss) -> None:
    """Add a loss of one's own to the table: from then on `DistillationArguments(losses={name: weight})` and recipes
    know it, and it is logged as `loss_<name>`.

    Raises:
        ConfigError: a name that is taken or not an identifier, or something to compare that there is not.
    """
    if loss.compares not in COMPARED:
        raise ConfigError(f"compares must be one of {', '.join(COMPARED)}, got {loss.compares!r}.")
    parts = {part for other in LOSSES.values() for part in other.parts}
    if not loss.name.isidentifier() or loss.name in LOSSES or parts & {loss.name, *loss.parts}:
        raise ConfigError(f"{loss.name!r} cannot name a loss: it must be an identifier that no other loss uses.")
    LOSSES[loss.name] = loss


def check_losses(losses: Collection[str], *, headless: bool) -> None:
    """ConfigError for a loss of logits without a head, or of embeddings with one."""
    refused = "logits" if headless else "embeddings"
    wrong = [name for name in losses if LOSSES[name].compares == refused]
    if not wrong:
        return
    others = [f"`{name}`" for name, loss in LOSSES.items() if not loss.needs_head]
    reason = (
        f"these models have no head, so there are no logits; use {', '.join(others[:-1])} or {others[-1]}"
        if headless
        else "it is for models without a head: load both with AutoModel"
    )
    raise ConfigError(f"losses has {' and '.join(f'`{name}`' for name in wrong)}, but {reason}.")
