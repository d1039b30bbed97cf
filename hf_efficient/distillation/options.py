"""The settings of distillation alone, checked without torch: `DistillationArguments` and recipes share them.

DistillationOptions(losses={"ce": 0.5, "kd": 0.5, "hidden": 1.0}, temperature=4.0)
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, unknown_name
from ..io.json import parse_json
from ..models.pooling import POOLINGS
from .losses.tables import ATTENTION_LOSSES, DIVERGENCES, HIDDEN_DISTANCES, MAX_TEMPERATURE, SCORE_LOSSES
from .terms import LOSSES

MAPS = ("auto", "uniform", "last", "linspace")
SOFT_POSITIONS = ("labels", "attended")
TEACHER_DTYPES = ("float32", "bfloat16", "float16")


def _option(*, help: str, **default: Any) -> Any:
    """As transformers' `HfArg`, which is not light."""
    return field(metadata={"help": help}, **default)


@dataclass
class DistillationOptions:
    """What `DistillationArguments` has beside `TrainingArguments`; the help of each field says what it means.

    Raises:
        ConfigError: a value that is not allowed.
    """

    losses: dict | str | None = _option(
        default_factory=lambda: {"ce": 1.0, "kd": 1.0},
        help='Weight of each loss, on the command line as JSON: \'{"ce": 1, "kd": 1}\'. '
        "ce: hard labels; kd: the teacher's soft labels; hidden: hidden states of mapped layers; attention: "
        "attention weights of mapped layers; relation: relations among queries, keys and values (MiniLM v2); "
        "attention_output: what the attentions of mapped layers give; embedding: pooled vectors of models without "
        "a head.",
    )
    temperature: float = _option(default=2.0, help="Both models' logits are divided by it before the kd divergence.")
    temperature_final: float | None = _option(
        default=None, help="The temperature goes in equal steps from `temperature` to this one; default: it stays."
    )
    temperature_squared: bool = _option(
        default=True, help="Multiply kd by temperature^2, so that its gradient does not shrink with the temperature."
    )
    divergence: str = _option(
        default="forward",
        help="Divergence of kd: forward, KL(teacher || student); reverse, KL(student || teacher); jsd.",
    )
    jsd_beta: float = _option(default=0.5, help="Weight of the teacher in the mixture of jsd, in (0, 1).")
    score_loss: str = _option(
        default="mse",
        help="How kd compares models with one output, such as rerankers: mse of their scores, or kl of the chances "
        "that they are (with temperature and divergence).",
    )
    soft_positions: str = _option(
        default="labels",
        help="Tokens on which kd is computed: labels (where a label counts; all tokens that are not padding if "
        "there are no labels) or attended (all tokens that are not padding).",
    )
    hidden_loss: str = _option(
        default="mse", help="Distance of hidden states: mse, or cosine (1 - cosine similarity)."
    )
    attention_loss: str = _option(
        default="kl", help="Distance of attentions: kl of the weights (MiniLM), or mse of the scores (TinyBERT)."
    )
    relation_heads: int | None = _option(
        default=None, help="Into how many heads relation cuts queries, keys and values; default: the teacher's heads."
    )
    relation_layers: list | str | dict | None = _option(
        default=None,
        help="Which layers relation compares, as in layer_map; default: the last ones. For teachers of 24 "
        "layers and more one of the upper middle is better (Wang et al. 2021): [[6, 19]].",
    )
    embedding_loss: str = _option(
        default="cosine", help="Distance of embeddings: cosine (1 - cosine similarity), or mse."
    )
    matryoshka_dims: list[int] | None = _option(
        default=None,
        help="Lengths such as 128 64: embedding compares the first so many numbers of the vectors too, so that they "
        "can be cut there (Kusupati et al. 2022).",
    )
    pooling: str = _option(
        default="mean",
        help="The embedding of a text: mean of its tokens, cls (the first one), last (the last one) or weighted_mean "
        "(the first token counts once, the second twice, and so on).",
    )
    layer_map: list | str | dict | None = _option(
        default="auto",
        help="Which teacher layer each student layer learns from: auto (the layers that the student kept of "
        "its teacher, else uniform), uniform, last, linspace, or JSON pairs [[student, teacher], ...] in which 0 "
        'is the embeddings; for encoder-decoders also {"encoder": ..., "decoder": ...}.',
    )
    truncate_vocabulary: bool = _option(
        default=False,
        help="Compare only the entries that both vocabularies have: for models with the same tokenizer whose "
        "embeddings are padded to different sizes.",
    )
    share_encoder: bool = _option(
        default=False,
        help="The student keeps the teacher's encoder (distil-whisper): it is frozen, and run once for both. "
        "For encoder-decoders.",
    )
    on_policy: float = _option(
        default=0.0,
        help="Fraction of optimizer steps, 0 to 1, whose texts the student writes itself, after the prompts of "
        "the data, and the teacher judges (GKD). For causal and seq2seq models, without ce.",
    )
    max_new_tokens: int = _option(default=128, help="Most tokens that the student writes with on_policy.")
    sampling_temperature: float = _option(default=1.0, help="At which the student draws its tokens with on_policy.")
    compile_student: str | None = _option(
        default=None,
        help="Run the student's forward through torch.compile with this backend, such as inductor; in place of "
        "torch_compile, which would compile the losses anew at every step.",
    )
    teacher_dtype: str | None = _option(
        default=None, help="Cast the teacher to float32, bfloat16 or float16; default: as it was loaded."
    )
    teacher_max_length: int | None = _option(
        default=None,
        help="The teacher gets only the first so many tokens of each text, where it takes fewer than the "
        "student; for tasks with one answer for a whole text. Default: all of them.",
    )

    def __post_init__(self) -> None:
        self.losses = _check_losses(self.losses)
        self.layer_map = _read_layer_map("layer_map", self.layer_map)
        if self.relation_layers is not None:
            self.relation_layers = _read_layer_map("relation_layers", self.relation_layers)
        check_name("divergence", self.divergence, DIVERGENCES)
        check_name("soft_positions", self.soft_positions, SOFT_POSITIONS)
        check_name("score_loss", self.score_loss, SCORE_LOSSES)
        check_name("hidden_loss", self.hidden_loss, HIDDEN_DISTANCES)
        check_name("attention_loss", self.attention_loss, ATTENTION_LOSSES)
        for name, what in (
            ("teacher_max_length", "1 token or more"),
            ("relation_heads", "1 or more"),
            ("max_new_tokens", "1 or more"),
        ):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name} must be {what}, got {value!r}.")
        check_name("embedding_loss", self.embedding_loss, HIDDEN_DISTANCES)
        check_name("pooling", self.pooling, POOLINGS)
        _check_dims(self.matryoshka_dims)
        if self.teacher_dtype is not None:
            check_name("teacher_dtype", self.teacher_dtype, TEACHER_DTYPES)
        for name in ("temperature", "temperature_final"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= MAX_TEMPERATURE:
                raise ConfigError(
                    f"{name} must be above 0 and at most {MAX_TEMPERATURE:g}, got {value!r}; usual are 1 to 10."
                )
        if not 0 <= self.on_policy <= 1:
            raise ConfigError(f"on_policy must be a fraction from 0 to 1, got {self.on_policy!r}.")
        if not 0 < self.sampling_temperature <= MAX_TEMPERATURE:
            raise ConfigError(f"sampling_temperature must be above 0, got {self.sampling_temperature!r}; usual is 1.")
        if not 0 < self.jsd_beta < 1:
            raise ConfigError(
                f"jsd_beta must be between 0 and 1, got {self.jsd_beta!r}. "
                "At the ends jsd is 0: use divergence='forward' or 'reverse'."
            )

    def temperature_at(self, progress: float) -> float:
        """The temperature when a fraction `progress` of all optimizer steps is done."""
        final = self.temperature if self.temperature_final is None else self.temperature_final
        return self.temperature + (final - self.temperature) * progress


def _check_losses(losses: object) -> dict[str, float]:
    if isinstance(losses, str):
        losses = _json("losses", losses)
    if not isinstance(losses, dict) or not losses:
        raise ConfigError(f"losses must map names to weights, such as {{'ce': 1.0, 'kd': 1.0}}, got {losses!r}.")
    for name, weight in losses.items():
        if name not in LOSSES:
            raise unknown_name("loss", name, LOSSES)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ConfigError(f"The weight of {name!r} must be a number from 0 up, got {weight!r}.")
    active = {name: float(losses[name]) for name in LOSSES if losses.get(name)}
    if not active:
        raise ConfigError(f"losses={losses!r} leaves nothing to train on: give at least one weight above 0.")
    return active


def _read_layer_map(what: str, layer_map: Any) -> Any:
    if isinstance(layer_map, str) and layer_map.lstrip().startswith(("[", "{")):
        layer_map = _json(what, layer_map)
    for name in layer_map.values() if isinstance(layer_map, dict) else [layer_map]:
        if isinstance(name, str) and name not in MAPS:
            raise unknown_name(what, name, MAPS)
    return layer_map


def _check_dims(dims: Any) -> None:
    good = dims is None or (isinstance(dims, list) and all(type(each) is int and each > 0 for each in dims))
    if not good or (dims is not None and not 0 < len(set(dims)) == len(dims)):
        raise ConfigError(f"matryoshka_dims must be a list of different lengths such as [128, 64], got {dims!r}.")


def _json(name: str, text: str) -> object:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ConfigError(
            f"{name}={text!r} is not JSON ({error}). Use double quotes inside, single quotes outside."
        ) from error


def check_name(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise unknown_name(name, value, known)
