"""What is wrong with a pair of models, found before the first step rather than in the numbers."""

from collections.abc import Collection
from dataclasses import replace

from peft import PeftModel
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from ..errors import ConfigError, UnsupportedModelError
from .batch import Task, base_of, task_of

NEEDS_DECODER_INPUTS = "prepare_decoder_input_ids_from_labels"


def check_models(student: nn.Module, teacher: nn.Module, losses: dict[str, float]) -> Task:
    """Compare student and teacher; gives the student's task.

    Raises:
        UnsupportedModelError: models that share weights, or whose heads, vocabularies or labels cannot be compared.
    """
    _check_separate(student, teacher)
    task, teacher_task = task_of(student), task_of(teacher)
    names = f"{type(base_of(student)).__name__} (student) and {type(base_of(teacher)).__name__} (teacher)"
    if task.kind != teacher_task.kind or task.stacks != teacher_task.stacks:
        raise UnsupportedModelError(f"{names} do different things. Load both with the same AutoModelFor... class.")
    _check_vocabularies(student, teacher)
    if task.kind == "examples" and "kd" in losses:
        _check_labels(task, teacher_task, student, teacher)
    if task.kind == "tokens" and len(task.stacks) == 2 and not hasattr(base_of(student), NEEDS_DECODER_INPUTS):
        raise UnsupportedModelError(
            f"{type(base_of(student)).__name__} has no {NEEDS_DECODER_INPUTS}, so student and teacher cannot be given "
            "the same decoder inputs."
        )
    if isinstance(student, PeftModel) and student.active_peft_config.is_prompt_learning:
        raise UnsupportedModelError(
            "Prompt-learning adapters add positions that the teacher does not have. Use LoRA or another adapter that "
            "keeps the sequence length."
        )
    # A fresh config leaves problem_type open until its first labels; the trained teacher's does not.
    return replace(task, problem=task.problem or teacher_task.problem)


def check_cut(task: Task, losses: Collection[str], length: int | None) -> None:
    """Refuse a teacher that reads only the beginning of a text where it has to say something about all of it.

    Raises:
        ConfigError: a task with an answer for each token, or a loss that compares tokens.
    """
    if length is None:
        return
    if task.kind != "examples":
        raise ConfigError(
            f"teacher_max_length={length} is for tasks with one answer for a whole text. Extend the teacher's "
            "positions, cut the data at its length, or train without it: losses={'ce': 1.0}."
        )
    compared = [name for name in ("hidden", "attention", "relation") if name in losses]
    if compared:
        raise ConfigError(
            f"teacher_max_length={length} leaves the teacher without states for the tokens behind it. Leave "
            f"{' and '.join(f'`{name}`' for name in compared)} out of losses, or cut the data at the teacher's length."
        )


def check_run(args: TrainingArguments, *, fsdp_version: int | None) -> None:
    """Refuse ways of running in which the loss would be wrong.

    Raises:
        ConfigError: nn.DataParallel or the first version of FSDP.
    """
    if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
        raise ConfigError(
            f"One process sees {args.n_gpu} GPUs and would use nn.DataParallel, which cannot run the losses. "
            "Start the script with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU."
        )
    if fsdp_version == 1:
        raise ConfigError("FSDP version 1 is not supported. Set fsdp_version: 2 in the accelerate config.")


def _check_separate(student: nn.Module, teacher: nn.Module) -> None:
    if not isinstance(teacher, nn.Module):
        raise ConfigError(
            f"teacher must be a loaded model, got {teacher!r}. Load it with AutoModelFor....from_pretrained."
        )
    shared = {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}
    if student is teacher or shared:
        raise UnsupportedModelError(
            "The teacher shares weights with the student, so it would change while it teaches. Load the teacher a "
            "second time; PEFT adapters are put into the model they are given, so give it another copy."
        )


def _check_vocabularies(student: nn.Module, teacher: nn.Module) -> None:
    sizes = [getattr(base_of(model).config.get_text_config(), "vocab_size", None) for model in (student, teacher)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise UnsupportedModelError(
            f"The student's vocabulary has {sizes[0]} entries, the teacher's {sizes[1]} and both read the same "
            "input_ids. With the same tokenizer and padded embeddings call resize_token_embeddings on one of them; "
            "models with different tokenizers cannot be compared token by token."
        )


def _check_labels(task: Task, teacher_task: Task, student: nn.Module, teacher: nn.Module) -> None:
    problems = {task.problem, teacher_task.problem} - {None}
    if task.num_labels != teacher_task.num_labels or len(problems) == 2:
        raise UnsupportedModelError(
            f"The student has {task.num_labels} labels (problem_type {task.problem}), the teacher "
            f"{teacher_task.num_labels} (problem_type {teacher_task.problem}). Load the student with the teacher's "
            "num_labels and problem_type, or leave `kd` out of losses."
        )
    orders = [[name for _, name in sorted((base_of(m).config.id2label or {}).items())] for m in (student, teacher)]
    if orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]):
        raise UnsupportedModelError(
            f"Student and teacher have the same labels in another order: {orders[0]} and {orders[1]}. Load the "
            "student with the teacher's id2label and label2id."
        )
