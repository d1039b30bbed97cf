"""The stage that changes attention: other kinds, more positions, and a fit of the learned parts to softmax.

- attention: {kind: local, window: 64, positions: 2048}
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..attention.config import AttentionConfig
from ..conversion.methods import METHODS, ROPE
from ..conversion.mixing import (
    MAX_LAYERS,
    NATIVE,
    STACK_NAMES,
    ByLayer,
    Mixing,
    read_layers,
    spread_layers,
    unknown_stack,
)
from ..errors import ConfigError, UnsupportedModelError, shown
from .base import Run, Stage, check_length
from .settings import (
    MAX_TOKENS,
    Settings,
    TrainingSettings,
    check_keys,
    integer,
    keys_of,
    make,
    number,
    one_of,
    part,
    read,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRANSFER_ROWS = 128  # on which the error of an attention transfer is reported
ATTENTION_KEYS = keys_of(AttentionConfig)


@dataclass(frozen=True)
class TransferSettings(TrainingSettings):
    """One attention transfer: only the learned parts of the new attention are trained, and take large steps."""

    learning_rate: float = number(1e-2, 0, 10, above=True)


@dataclass(frozen=True)
class LongerSettings(Settings):
    """Longer inputs than the model was made for: the arguments of `extend_positions`."""

    positions: int | None = integer(None, 2, MAX_TOKENS, optional=True)  # tokens
    position_method: str = one_of("tile", METHODS)  # of a learned table
    rope: str | None = one_of(None, ROPE, optional=True)  # of rotary positions

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions is None and (self.position_method != "tile" or self.rope is not None):
            raise ConfigError("positions must say how many tokens the model shall take, got null.")

    def to_dict(self) -> dict[str, Any]:
        """Nothing where nothing is asked for."""
        if self.positions is None:
            return {}
        return {name: value for name, value in super().to_dict().items() if value is not None}


@dataclass(frozen=True)
class AttentionStage(Stage):
    """`convert_attention(model, stage.config, layers=stage.layers)`, of a model for longer inputs, with transfer.

    In YAML one variant, in all layers or in some, or a variant for each layer, range, slice or stack (the keys of
    `conversion.mixing`):

        - attention: {kind: local, window: 64}
        - attention: {kind: local, window: 64, layers: [0, 1, 2]}       # or a pattern: layers: "3::4"
        - attention: {kind: native}                                    # the model's own windows, as windows
        - attention: {layers: {all: {kind: local, window: 64}, "3::4": {kind: full}}}
        - attention: {layers: {encoder: {kind: local}, decoder: {all: {kind: local}, 0: {kind: full}}}}

    Beside it, where wanted:

        positions: 2048                # tokens that the model shall take; the tokenizer follows
        position_method: interpolate   # a learned table is tiled unless told so
        rope: yarn                     # rotary positions: linear, dynamic or yarn
        transfer: {max_steps: 100, batch_size: 8, learning_rate: 1e-2}    # fit the learned parts to softmax first
    """

    config: Mixing
    layers: tuple[int, ...] | str | None = None
    longer: LongerSettings = field(default_factory=LongerSettings)
    transfer: TransferSettings | None = None

    @classmethod
    def read(cls, section: Any, path: str, task: str | None = None) -> "AttentionStage":
        extending = keys_of(LongerSettings)
        if isinstance(section, dict) and (stacks := sorted(STACK_NAMES & section.keys())):
            raise ConfigError(f"{path}: {', '.join(stacks)} must stand under `layers`.")
        check_keys(section, [*ATTENTION_KEYS, "layers", *extending, "transfer"], path)
        if not section:
            raise ConfigError(f"{path} is empty: give a kind, as in `attention: {{kind: local, window: 64}}`.")
        longer = read(LongerSettings, part(section, extending), path)
        transfer = section.get("transfer")
        if transfer is not None:
            transfer = read(TransferSettings, transfer, f"{path}.transfer")
        settings = {key: value for key, value in section.items() if key in ATTENTION_KEYS}
        layers = section.get("layers")
        if settings.get("kind") == NATIVE:
            if beside := [*sorted(settings.keys() - {"kind"}), *(["layers"] if layers is not None else [])]:
                raise ConfigError(
                    f"{path}: {', '.join(beside)} beside kind {NATIVE}, which is what the model itself has."
                )
            return cls(NATIVE, None, longer, transfer)
        if not isinstance(layers, dict):
            chosen = None if layers is None else _some_layers(layers, f"{path}.layers")
            return cls(make(AttentionConfig, settings, path), chosen, longer, transfer)
        if settings:
            raise ConfigError(f"{path}: {', '.join(settings)} beside a mapping of layers; say it inside each layer.")
        if not layers:
            raise ConfigError(f"{path}.layers is empty: leave it out to convert all layers.")
        return cls(_read_mixing(layers, f"{path}.layers"), None, longer, transfer)

    def to_dict(self) -> dict[str, Any]:
        if isinstance(self.config, str):
            written: dict[str, Any] = {"kind": self.config}
        elif isinstance(self.config, AttentionConfig):
            written = self.config.to_dict()
            if self.layers is not None:
                written["layers"] = self.layers if isinstance(self.layers, str) else list(self.layers)
        else:
            written = {"layers": _written(self.config)}
        return written | self.longer.to_dict() | ({"transfer": self.transfer.to_dict()} if self.transfer else {})

    @property
    def training(self) -> TransferSettings | None:
        return self.transfer

    def check_lengths(self, path: str, run: Run, limit: int) -> int:
        limit = max(limit, self.longer.positions or 0)
        if self.transfer is not None:
            check_length(f"{path}.transfer.max_length", self.transfer.max_length, limit)
        return limit

    def check(self, path: str, run: Run, config: Any, before: Sequence[Stage]) -> Any:
        try:
            return self.plan(run, config)[0]
        except (ConfigError, UnsupportedModelError) as error:
            raise type(error)(f"{path}: {error}") from error

    def plan(self, run: Run, config: Any) -> tuple[Any, None]:
        from ..conversion.convert import efficient_config
        from ..conversion.positions import longer_config
        from ..distillation.transfer import check_learned, find_attentions
        from ..models.classes import block_of, with_block

        longer = self.longer
        if longer.positions is not None:
            changes = longer_config(config, longer.positions, longer.position_method, longer.rope)
            config = with_block(config, block_of(config), **changes)
        config = efficient_config(config, self.config, self.layers)
        if self.transfer is not None:
            check_learned(find_attentions(run.skeleton(config)))
        return config, None

    def run(self, run: Run, source: Path, target: Path) -> dict[str, Any]:
        from .fit import trained

        settings = self.transfer
        if settings is None:
            return run.save(self._converted(run, source), target)

        def transferred(batch_size: int) -> "tuple[PreTrainedModel, dict[str, Any]]":
            model = self._converted(run, source)
            return model, transfer(run, model, settings, target, batch_size)

        (model, facts), smaller = trained(run, settings, transferred)
        return facts | smaller | run.save(model, target)

    def _converted(self, run: Run, source: Path) -> "PreTrainedModel":
        from ..conversion.convert import convert_attention
        from ..conversion.positions import extend_positions

        model, longer = run.load(source), self.longer
        if longer.positions is not None:
            model = extend_positions(model, longer.positions, longer.position_method, longer.rope)
        return convert_attention(model, self.config, layers=self.layers)


def transfer(
    run: Run, model: "PreTrainedModel", settings: TransferSettings, target: Path, batch_size: int
) -> dict[str, Any]:
    """Fit the learned parts to softmax attention; the errors before and after are those of test rows."""
    from transformers import TrainingArguments

    from ..distillation.transfer import TransferTrainer
    from .fit import fit, make_trainer, training_arguments

    prepared = run.data(settings.max_length, config=model.config)
    arguments = training_arguments(TrainingArguments, run, settings, target, batch_size)
    trainer = make_trainer(TransferTrainer, model, arguments, prepared)
    rows = prepared.test.select(range(min(TRANSFER_ROWS, len(prepared.test))))
    before = trainer.evaluate(rows)["eval_transfer_error"]
    fit(trainer)
    after = trainer.evaluate(rows)["eval_transfer_error"]
    model.eval()
    return {"transfer_error_before": before, "transfer_error_after": after, "steps": trainer.state.global_step}


def _written(config: Any) -> Any:
    if isinstance(config, AttentionConfig):
        return config.to_dict()
    return {str(key): _written(value) for key, value in config.items()}


def _read_mixing(section: dict[str, Any], path: str) -> Mixing:
    """Stack by stack if a key is the name of one, else layer by layer."""
    if not any(key in STACK_NAMES for key in section):
        return _read_layers(section, path)
    for key in section:
        if key not in STACK_NAMES:
            raise ConfigError(f"{path}: {unknown_stack(key, STACK_NAMES)}")
    mixing: dict[str, ByLayer] = {}
    for key, value in section.items():  # one attention for the whole stack, or a mapping of its layers
        parts = value.items() if isinstance(value, dict) else ()
        by_layer = any(isinstance(part, dict) and name != "options" for name, part in parts)
        mixing[key] = (_read_layers if by_layer else _read_config)(value, f"{path}.{key}")
    return mixing


def _read_layers(section: dict[str, Any], path: str) -> dict[int | str, AttentionConfig]:
    configs: dict[int | str, AttentionConfig] = {
        key: _read_config(value, f"{path}.{key}") for key, value in section.items()
    }
    try:
        spread_layers(
            dict.fromkeys(configs, AttentionConfig()), MAX_LAYERS
        )  # how many layers there are is not known yet; the form of the keys is
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return configs


def _read_config(section: Any, path: str) -> AttentionConfig:
    check_keys(section, ATTENTION_KEYS, path)
    return make(AttentionConfig, section, path)


def _some_layers(layers: Any, path: str) -> tuple[int, ...] | str:
    """A list of layer numbers, or a pattern."""
    if isinstance(layers, str):
        try:
            read_layers(layers, MAX_LAYERS)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        return layers
    if not isinstance(layers, list) or not layers or not all(type(n) is int and 0 <= n < MAX_LAYERS for n in layers):
        raise ConfigError(
            f"{path} must be a list of layer numbers from 0 to {MAX_LAYERS - 1}, a pattern such as '3::4', or a "
            f'mapping such as {{"0": {{kind: full}}, "1-4": {{kind: local}}}}, got {shown(layers)}.'
        )
    if len(set(layers)) < len(layers):
        raise ConfigError(f"{path} names a layer twice: {shown(layers)}.")
    return tuple(sorted(layers))
