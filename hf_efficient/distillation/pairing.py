"""One student and one teacher, checked against each other: what of them is compared, and where to find it.

pairing = pair(student, teacher, args)
pairing.head, pairing.pairs["hidden"], pairing.projections
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..models.token_masks import counts_columns, first_positions
from ..training.batch import Batch, Head, base_of, forward_names
from .arguments import DistillationArguments
from .cache.cache import TeacherCache
from .checks import check_cut, check_dims, check_models, check_on_policy, check_shared_encoder, common_vocabulary
from .hidden_states import wanted_states
from .layer_map import Pairs, map_attentions, map_layers, width
from .losses.projections import make_projections
from .recorded import Modules, output_widths, self_attentions
from .sums import LossSettings, place_name
from .terms import LOSSES, Loss

SIDES = ("student", "teacher")


@dataclass(frozen=True)
class Pairing:
    """
    Fields:
        losses: the entries of the table that are trained on.
        pairs: by loss and stack the (student, teacher) layers that it compares.
        projections: between the widths, where they differ.
        names: what the forward of each side takes; nothing where there is no teacher.
        counts_columns: whether each side is to be told the positions of tokens behind padding.
        recorded: the attentions of each side that a loss looks into.
        vocabulary: how many entries both vocabularies share, where one of them is padded.
    """

    head: Head
    losses: Mapping[str, Loss]
    pairs: Mapping[str, Mapping[str, Pairs]]
    projections: nn.ModuleDict
    names: Mapping[str, Collection[str]]
    counts_columns: Mapping[str, bool]
    recorded: Mapping[str, Modules]
    vocabulary: int | None

    @property
    def needs_teacher(self) -> bool:
        return any(loss.needs_teacher for loss in self.losses.values())

    def settings(self, args: DistillationArguments, progress: float) -> LossSettings:
        """The numbers of the losses when a fraction `progress` of the steps is done."""
        temperature = args.temperature_at(progress)
        return LossSettings(args, temperature, self.pairs, self.projections, self.vocabulary)

    def inputs(self, side: str, batch: Batch, student: PreTrainedModel) -> dict[str, Any]:
        """What the forward of one side is given; the student makes the decoder inputs of both."""
        inputs = batch.model_inputs(self.names[side], student)
        if self.counts_columns[side]:
            inputs |= first_positions(batch.inputs)
        stacks = (own for name, own in self.pairs.items() if self.losses[name].needs_states)
        pairs = (pair for own in stacks for each in own.values() for pair in each)
        return inputs | wanted_states(pair[SIDES.index(side)] for pair in pairs)


def pair(
    student: nn.Module, teacher: nn.Module | None, args: DistillationArguments, cache: TeacherCache | None = None
) -> Pairing:
    """Compare the models, and find what the losses need of them (without a teacher, of the student alone); raises for
    models that cannot be compared so, or would silently be trained wrongly."""
    head = check_models(student, teacher, args.losses, truncate_vocabulary=args.truncate_vocabulary)
    losses = {name: LOSSES[name] for name in args.losses}
    if teacher is None:
        names = {"student": forward_names(student), "teacher": frozenset()}
        counted = {"student": counts_columns(base_of(student), names["student"]), "teacher": False}
        return Pairing(head, losses, {}, nn.ModuleDict(), names, counted, {"student": {}, "teacher": {}}, None)
    check_cut(head, args.losses, args.teacher_max_length)
    check_dims(student, teacher, args.matryoshka_dims, args.losses)
    if args.on_policy:
        check_on_policy(student, args.losses, is_cached=cache is not None)
    if args.share_encoder:
        check_shared_encoder(head, student, teacher, args.losses)
    pairs = _pairs(student, teacher, args, losses, head)
    if cache is not None:
        cache.check(args, pairs)
    sides = dict(zip(SIDES, (student, teacher), strict=True))
    names = {side: forward_names(model) for side, model in sides.items()}
    return Pairing(
        head=head,
        losses=losses,
        pairs=pairs,
        projections=_projections(student, teacher, losses, pairs).to(args.device),
        names=names,
        counts_columns={side: counts_columns(base_of(model), names[side]) for side, model in sides.items()},
        recorded={
            side: _to_record(model, index, losses, pairs, head) for index, (side, model) in enumerate(sides.items())
        },
        vocabulary=common_vocabulary(student, teacher) if args.truncate_vocabulary else None,
    )


def _pairs(
    student: nn.Module, teacher: nn.Module, args: DistillationArguments, losses: Mapping[str, Loss], head: Head
) -> dict[str, dict[str, Pairs]]:
    """The layers that each loss compares, by stack."""
    pairs = {}
    for name, loss in losses.items():
        if loss.needs_attentions:
            layer_map = args.relation_layers if name == "relation" else args.layer_map
            pairs[name] = map_attentions(student, teacher, layer_map, head.stacks)
        elif loss.maps_layers:
            pairs[name] = map_layers(student, teacher, args.layer_map, head.stacks)
    return pairs


def _projections(
    student: nn.Module, teacher: nn.Module, losses: Mapping[str, Loss], pairs: Mapping[str, Mapping[str, Pairs]]
) -> nn.ModuleDict:
    """For what has a width of its own; queries, keys and values are compared without."""
    places = {loss: [(s, pair) for s, own in pairs.get(loss, {}).items() for pair in own] for loss in pairs}
    widths = {}
    of_states = [name for name in pairs if losses[name].needs_states]
    if of_states or "embedding" in losses:
        both = width(student), width(teacher)
        widths = {place_name(name, *place): both for name in of_states for place in places[name]}
        widths |= {"embedding": both} if "embedding" in losses else {}
    for name in (name for name in pairs if losses[name].projects_outputs):
        own, other = (output_widths(model, tuple(pairs[name])) for model in (student, teacher))
        for stack, pair in places[name]:
            widths[place_name(name, stack, pair)] = (own[stack, pair[0] - 1], other[stack, pair[1] - 1])
    return make_projections(widths, next(student.parameters()).dtype)


def _to_record(
    model: nn.Module, side: int, losses: Mapping[str, Loss], pairs: Mapping[str, Mapping[str, Pairs]], head: Head
) -> Modules:
    """The attentions of one model that a loss looks into; side 0 is the student, 1 the teacher."""
    places = {
        (stack, place[side] - 1)
        for name, stacks in pairs.items()
        if losses[name].needs_attentions
        for stack, own in stacks.items()
        for place in own
    }
    if not places:
        return {}
    return {place: module for place, module in self_attentions(model, head.stacks).items() if place in places}
