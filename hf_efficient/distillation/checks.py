"""What is wrong with a pair of models, found before the first step rather than in the numbers."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..errors import ConfigError, UnsupportedModelError
from ..models.heads import PREPARE, shifts_labels
from ..models.registry import text_config
from ..training.batch import FramesHead, Head, base_of, head_of
from .generation import GENERATING, writes
from .layer_map import width
from .terms import LOSSES, check_losses


def check_models(
    student: nn.Module, teacher: nn.Module | None, losses: Collection[str], *, truncate_vocabulary: bool = False
) -> Head:
    """The student's head; UnsupportedModelError if heads, vocabularies or labels cannot be compared."""
    head = head_of(student)
    check_losses(losses, headless=head.kind == "embeddings")
    if teacher is None:
        _check_student(student, head)
        return head
    teacher_head = head_of(teacher)
    names = f"{type(base_of(student)).__name__} (student) and {type(base_of(teacher)).__name__} (teacher)"
    if head.kind != teacher_head.kind or head.stacks != teacher_head.stacks:
        raise UnsupportedModelError(f"{names} do different things. Load both with the same AutoModelFor... class.")
    if isinstance(head, FramesHead) and not head.is_like(teacher_head):
        raise UnsupportedModelError(
            f"{names} make different numbers of frames of a sound, or have different blank tokens. Take a student "
            "whose feature extractor and tokenizer are the teacher's, such as the pruned teacher."
        )
    sizes = _vocabularies(student, teacher)
    if len(set(sizes)) > 1 and not truncate_vocabulary:
        raise UnsupportedModelError(
            f"The student's vocabulary has {sizes[0]} entries, the teacher's {sizes[1]} and both read the same "
            "input_ids. If the tokenizer is the same and only embeddings are padded, set truncate_vocabulary=True; "
            "models with different tokenizers cannot be compared token by token."
        )
    if "kd" in losses:
        _check_labels(head, teacher_head, student, teacher)
    _check_student(student, head)
    # A fresh config leaves problem_type open until its first labels; the trained teacher's does not.
    return replace(head, problem=head.problem or teacher_head.problem)


def _check_student(student: nn.Module, head: Head) -> None:
    if head.kind == "tokens" and len(head.stacks) == 2 and not shifts_labels(base_of(student)):
        raise UnsupportedModelError(
            f"{type(base_of(student)).__name__} has no {PREPARE}, and its config no "
            "decoder_start_token_id and pad_token_id, so student and teacher cannot be given the same decoder inputs. "
            "Set both in the config."
        )
    if isinstance(student, PeftModel) and student.active_peft_config.is_prompt_learning:
        raise UnsupportedModelError(
            "Prompt-learning adapters add positions that the teacher does not have. Use LoRA or another adapter that "
            "keeps the sequence length."
        )


def check_alone(args: Any) -> None:
    """ConfigError for a setting of the teacher, where there is none."""
    for name in ("teacher_dtype", "teacher_max_length", "share_encoder"):
        if getattr(args, name):
            raise ConfigError(f"{name}={getattr(args, name)!r} needs a teacher, and none was given. Leave it out.")


def check_cut(head: Head, losses: Collection[str], length: int | None) -> None:
    """ConfigError if a teacher that reads only the beginning of a text has to say something about all of it."""
    if length is None:
        return
    if head.kind != "examples":
        raise ConfigError(
            f"teacher_max_length={length} is for tasks with one answer for a whole text. Extend the teacher's "
            "positions, cut the data at its length, or train without it: losses={'ce': 1.0}."
        )
    compared = [name for name in losses if LOSSES[name].maps_layers]
    if compared:
        raise ConfigError(
            f"teacher_max_length={length} leaves the teacher without states for the tokens behind it. Leave "
            f"{' and '.join(f'`{name}`' for name in compared)} out of losses, or cut the data at the teacher's length."
        )


def check_dims(student: nn.Module, teacher: nn.Module, dims: Collection[int] | None, losses: Collection[str]) -> None:
    """ConfigError unless vectors can be cut at these lengths, and the first numbers of both mean the same."""
    if dims is None:
        return
    if "embedding" not in losses:
        raise ConfigError("matryoshka_dims belongs to the loss `embedding`, which losses has not. Leave it out.")
    own, other = width(student), width(teacher)
    if own != other:
        raise ConfigError(
            f"matryoshka_dims compares the first numbers of two vectors, and a student of width {own} has others than "
            f"its teacher of width {other}. Take a student of that width, such as a pruned one, or leave it out."
        )
    if max(dims) >= own:
        raise ConfigError(f"matryoshka_dims has {max(dims)}, and vectors are {own} numbers long. Give shorter ones.")


def check_shared_encoder(head: Head, student: nn.Module, teacher: nn.Module, losses: Collection[str]) -> None:
    """ConfigError unless the student's encoder is the teacher's, and no loss looks into it: one run serves both."""
    if len(head.stacks) < 2 or head.kind != "tokens":
        raise ConfigError("share_encoder=True is for encoder-decoders that generate, such as T5, BART and Whisper.")
    by_layer = [name for name in losses if LOSSES[name].maps_layers]
    if by_layer:
        raise ConfigError(
            f"share_encoder=True runs the encoder once, so {' and '.join(f'`{name}`' for name in by_layer)} would "
            "compare it with itself. Leave them out of losses, or share_encoder."
        )
    own, other = (base_of(model).get_encoder().state_dict() for model in (student, teacher))
    same = own.keys() == other.keys() and all(
        own[name].shape == other[name].shape and torch.equal(own[name].float().cpu(), other[name].float().cpu())
        for name in own
    )
    if not same:
        raise ConfigError(
            "share_encoder=True needs a student whose encoder has the teacher's weights: "
            'build_student(teacher, layers={"decoder": 2}) keeps it whole.'
        )


def check_on_policy(student: nn.Module, losses: Collection[str], *, is_cached: bool) -> None:
    """ConfigError unless the student can write what it is trained on, and a live teacher judge it, without labels."""
    if not writes(student):
        raise ConfigError(f"on_policy is for {GENERATING}; got {type(base_of(student)).__name__}.")
    if "ce" in losses:
        raise ConfigError(
            "on_policy trains on what the student wrote, which the `ce` loss would take for the truth. Leave `ce` out "
            "of losses."
        )
    if is_cached:
        raise ConfigError("on_policy needs the teacher itself: a cache has no answers to texts written in training.")


def check_sharded(args: Any, *, teaches_itself: bool) -> None:
    """ConfigError for a student under FSDP, where a weight is whole only while its layer runs, that generates or is
    its own teacher."""
    if args.on_policy:
        raise ConfigError("on_policy does not work under FSDP, whose shards do not generate. Use DDP or ZeRO-2.")
    if teaches_itself:
        raise ConfigError("Under FSDP a PEFT student cannot be its own teacher. Give a teacher, which is sharded too.")


def check_separate(student: nn.Module, teacher: object) -> None:
    """Whether the teacher stays as it is while the student is trained.

    Raises:
        ConfigError: no model.
        UnsupportedModelError: models that share weights.
    """
    if not isinstance(teacher, nn.Module):
        raise ConfigError(
            f"teacher must be a loaded model, got {teacher!r}. Load it with AutoModelFor....from_pretrained."
        )
    shared = {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}
    if student is teacher or shared:
        raise UnsupportedModelError(
            "The teacher shares weights with the student, so it would change while it teaches. Load the teacher a "
            "second time. PEFT adapters are put into the model they are given: leave teacher out, and the student "
            "learns from its own base without them."
        )


def common_vocabulary(student: nn.Module, teacher: nn.Module) -> int | None:
    """How many entries both vocabularies have, if their sizes differ."""
    sizes = _vocabularies(student, teacher)
    return None if len(set(sizes)) < 2 else min(sizes)


def _vocabularies(student: nn.Module, teacher: nn.Module) -> list[int]:
    """Of the models that have one."""
    sizes = [getattr(text_config(base_of(model).config), "vocab_size", None) for model in (student, teacher)]
    return [size for size in sizes if size is not None]


def _check_labels(head: Head, teacher_head: Head, student: nn.Module, teacher: nn.Module) -> None:
    problems = {head.problem, teacher_head.problem} - {None}
    if head.num_labels != teacher_head.num_labels or len(problems) == 2:
        raise UnsupportedModelError(
            f"The student has {head.num_labels} labels (problem_type {head.problem}), the teacher "
            f"{teacher_head.num_labels} (problem_type {teacher_head.problem}). Load the student with the teacher's "
            "num_labels and problem_type, or leave `kd` out of losses."
        )
    orders = [[name for _, name in sorted((base_of(m).config.id2label or {}).items())] for m in (student, teacher)]
    if orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]):
        raise UnsupportedModelError(
            f"Student and teacher have the same labels in another order: {orders[0]} and {orders[1]}. Load the "
            "student with the teacher's id2label and label2id."
        )
