"""What a user may ask of one attention layer.

    AttentionConfig(kind="local", window=64, global_tokens=1)

An `AttentionConfig` is plain data: it is written to config.json as a small dict and read back with the same checks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

from ..errors import ConfigError, shown, unknown_name
from ..io.lazy import LazyTable

MAX_WINDOW = 1 << 20
MAX_GLOBAL_TOKENS = 4096
MAX_BLOCK = 4096
MAX_COUNT = 1 << 16
MAX_FEATURES = 4096

SINKS = 4  # global tokens in decoders, unless told otherwise
_FORGETTING = ("local", "topk")  # kinds that would lose the first tokens
_SEEDED = ("favor",)  # feature maps with a random projection


class Kind(NamedTuple):
    """One attention kind: which fields of `AttentionConfig` mean something for it (the others must keep their
    default), and its `AttentionVariant`, a class or the path of one (see `LazyTable`); None for softmax over all."""

    fields: tuple[str, ...]
    variant: Any


# The table of attention kinds; `register_attention` adds to it.
KINDS: dict[str, Kind] = {
    "full": Kind((), None),
    "local": Kind(("window", "global_tokens", "streaming"), "attention.kinds.local:LocalAttention"),
    "strided": Kind(("block_size", "num_blocks", "global_tokens"), "attention.kinds.strided:StridedAttention"),
    "lsh": Kind(("block_size", "num_hashes", "num_buckets", "seed"), "attention.kinds.lsh:LshAttention"),
    "topk": Kind(("block_size", "top_k", "global_tokens"), "attention.kinds.topk:TopkAttention"),
    "linear": Kind(("feature_map", "feature_dim", "seed"), "attention.kinds.linear:LinearAttention"),
    "local_linear": Kind(
        ("window", "feature_map", "feature_dim", "seed"), "attention.kinds.local_linear:LocalLinearAttention"
    ),
    "additive": Kind((), "attention.kinds.additive:AdditiveAttention"),
    "kernel": Kind(("kernel", "feature_dim", "seed"), "attention.kinds.kernel:KernelAttention"),
    "merging": Kind(("merged_tokens", "protected_tokens"), "attention.kinds.merging:MergingAttention"),
}
FEATURE_MAPS: LazyTable[Any] = LazyTable(
    {
        "elu": "attention.engines.feature_maps:ELU",
        "relu": "attention.engines.feature_maps:RELU",
        "favor": "attention.engines.feature_maps:FAVOR",
        "hedgehog": "attention.engines.feature_maps:HEDGEHOG",
    }
)
KERNELS: LazyTable[Any] = LazyTable(
    {
        "gaussian": "attention.kinds.kernel:gaussian",
        "exponential": "attention.kinds.kernel:exponential",
        "cauchy": "attention.kinds.kernel:cauchy",
    }
)

_RANGES = {
    "window": (1, MAX_WINDOW),
    "global_tokens": (0, MAX_GLOBAL_TOKENS),
    "block_size": (1, MAX_BLOCK),
    "num_blocks": (0, MAX_COUNT),
    "top_k": (1, MAX_COUNT),
    "num_hashes": (1, 64),
    "num_buckets": (1, MAX_COUNT),
    "feature_dim": (0, MAX_FEATURES),
    "protected_tokens": (0, MAX_GLOBAL_TOKENS),
    "seed": (0, (1 << 31) - 1),
}
_MAY_BE_NONE = ("feature_dim", "global_tokens", "protected_tokens")


def decreasing_tokens(mean: int, layers: int) -> list[int]:
    """How many tokens each layer merges where the first ones merge most: from 2 x `mean` down to 0, `mean` on average
    (the decreasing schedule of ToMe, Bolya 2023).

        AttentionConfig("merging", merged_tokens=decreasing_tokens(8, layers=12))
    """
    return [round(2 * mean * (layers - 1 - layer) / (layers - 1)) for layer in range(layers)] if layers > 1 else [mean]


@dataclass(frozen=True)
class AttentionConfig:
    """One layer's attention. Which fields a kind uses is said in `KINDS`; see docs/attention.md for each kind.

    Parameters:
        kind: `"full"`, `"local"`, `"strided"`, `"lsh"`, `"topk"`, `"linear"`, `"local_linear"`, `"additive"`,
            `"kernel"`, `"merging"`, or a name given to `register_attention`.
        window: `local`, `local_linear`: in tokens. Bidirectional: keys with |i - j| <= window. Causal: the last
            `window` keys including the token itself, as transformers' `sliding_window`.
        global_tokens: `local`, `strided`, `topk`: the number of first tokens (padding not counted) that see all and
            are seen by all. None: 4 for `local` and `topk` in a causal stack, 0 else (see `resolve`).
        streaming: `local` in a decoder with rotary positions: the global tokens seem to stand right before the window,
            however far back they are, so that a text may be longer than any that the model was trained on.
        block_size: `strided`, `topk`: tokens in a block. `lsh`: how many keys of its bucket a query sees.
        num_blocks: `strided`: the other blocks that a block sees, beside itself.
        top_k: `topk`: the blocks that a block sees, itself included.
        num_hashes: `lsh`: rounds of hashing.
        num_buckets: `lsh`: buckets of one round; even, or 1.
        feature_map: `linear`, `local_linear`: `"elu"`, `"relu"`, `"favor"` or `"hedgehog"` (learned).
        feature_dim: `favor`: random features, default the head dimension. `kernel`: content features, default 16;
            0: a kernel of the positions alone.
        kernel: `kernel`: `"gaussian"`, `"exponential"` (ALiBi's) or `"cauchy"` (far reach), of a learned width.
        merged_tokens: `merging`: how many tokens a layer joins to others, at most half of them; a list has one number
            for each of the layers that it is given for (`decreasing_tokens` makes one).
        protected_tokens: `merging`: the first tokens, of no part of the image, that are never merged. None: found out.
        seed: of what is drawn at random: rotations of `lsh`, projections of `favor` and `kernel`.
        options: settings of a kind of your own (`register_attention`): a flat mapping to numbers, text or booleans.

    Raises:
        ConfigError: a value out of range, an unknown kind, or a field that the kind does not use.
    """

    kind: str = "full"
    window: int = 128
    global_tokens: int | None = None
    streaming: bool = False
    block_size: int = 64
    num_blocks: int = 7
    top_k: int = 8
    num_hashes: int = 2
    num_buckets: int = 32
    feature_map: str = "elu"
    feature_dim: int | None = None
    kernel: str = "gaussian"
    merged_tokens: int | Sequence[int] = 8
    protected_tokens: int | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            unknown = unknown_name("attention kind", self.kind, KINDS)
            raise ConfigError(f"{unknown} A kind of your own needs `register_attention` first.")
        if self.feature_map not in FEATURE_MAPS:
            raise unknown_name("feature_map", self.feature_map, FEATURE_MAPS)
        if self.kernel not in KERNELS:
            raise unknown_name("kernel", self.kernel, KERNELS)
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ConfigError(f"{name} must be an integer from {low} to {high}, got {shown(value)}.")
        self._check_merged()
        if type(self.streaming) is not bool or (self.streaming and self.global_tokens == 0):
            raise ConfigError(
                f"streaming must be true or false, and true needs global tokens to keep near; got "
                f"{shown(self.streaming)} with global_tokens={self.global_tokens}."
            )
        if self.global_tokens == 0 and "global_tokens" not in KINDS[self.kind].fields:
            object.__setattr__(self, "global_tokens", None)  # no global tokens is true of every kind
        if self.num_buckets > 1 and self.num_buckets % 2:
            raise ConfigError(f"num_buckets must be even, or 1, got {self.num_buckets}: a hash has two signs.")
        if self.feature_dim == 0 and self.kind != "kernel":
            raise ConfigError(
                "feature_dim=0 has a meaning for kind='kernel' only. Leave it out for the head dimension."
            )
        if not isinstance(self.options, Mapping) or not all(
            isinstance(key, str) and isinstance(value, int | float | str | bool) for key, value in self.options.items()
        ):
            raise ConfigError(
                f"options must be a flat mapping from names to numbers, text or booleans, got {shown(self.options)}."
            )
        object.__setattr__(self, "options", dict(self.options))  # what the caller does with theirs does not matter
        used = self._used()
        for entry in fields(self):
            default = {} if entry.name == "options" else entry.default
            if entry.name != "kind" and entry.name not in used and getattr(self, entry.name) != default:
                allowed = ", ".join(used) or "no other field"
                raise ConfigError(
                    f"{entry.name}={shown(getattr(self, entry.name))} has no meaning for {self._described()}, "
                    f"which uses {allowed}. Remove it or choose another kind."
                )

    def resolve(self, causal: bool) -> "AttentionConfig":
        """The same with a number of global tokens, if the kind has any and none was asked for.

        The first tokens of a causal model are attention sinks: they take much of the softmax whatever they say, and a
        window that loses them loses the text (StreamingLLM 2023, arXiv 2309.17453). So `local`, which forgets them,
        and `topk`, which may not choose them, keep 4; `strided` has the first block among its own from two on.

        Parameters:
            causal: of self-attention over all tokens so far, as trained. A window that the model was trained with has
                no sinks outside of it.
        """
        if self.global_tokens is not None or "global_tokens" not in KINDS[self.kind].fields:
            return self
        count = SINKS if causal and self.kind in _FORGETTING else 0
        return replace(self, global_tokens=count, streaming=self.streaming and count > 0)

    def _check_merged(self) -> None:
        merged, is_list = self.merged_tokens, isinstance(self.merged_tokens, list | tuple)
        numbers = merged if isinstance(merged, list | tuple) else (merged,)
        if not numbers or not all(type(number) is int and 0 <= number <= MAX_COUNT for number in numbers):
            raise ConfigError(
                f"merged_tokens must be an integer from 0 to {MAX_COUNT}, or a list of such, got {shown(merged)}."
            )
        if is_list:
            object.__setattr__(self, "merged_tokens", tuple(numbers))

    def for_layers(self, count: int) -> "list[AttentionConfig]":
        """One config for each of `count` layers: a list of `merged_tokens` has a number for each.

        Raises:
            ConfigError: it has another number of numbers.
        """
        if isinstance(self.merged_tokens, int):
            return [self] * count
        if len(self.merged_tokens) != count:
            raise ConfigError(f"merged_tokens has {len(self.merged_tokens)} numbers for {count} layers.")
        return [replace(self, merged_tokens=number) for number in self.merged_tokens]

    def _used(self) -> tuple[str, ...]:
        used = KINDS[self.kind].fields
        if "feature_map" in used and self.feature_map not in _SEEDED:
            used = tuple(name for name in used if name not in ("feature_dim", "seed"))
        return used

    def _described(self) -> str:
        with_map = f" with feature_map={self.feature_map!r}" if "feature_map" in KINDS[self.kind].fields else ""
        return f"kind={self.kind!r}{with_map}"

    def to_dict(self) -> dict[str, Any]:
        """Only what the kind uses: `{"kind": "local", "window": 64, "global_tokens": 1}`."""
        used = ("kind", *self._used())
        written = {name: value for name, value in asdict(self).items() if name in used and value not in (None, {})}
        if not self.streaming:  # as configs were written before there was such a thing
            written.pop("streaming", None)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in written.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AttentionConfig":
        """Read back `to_dict`; an unknown key is an error that names the known ones."""
        if not isinstance(data, dict):
            raise ConfigError(
                f"An attention setting must be a mapping such as {{'kind': 'local'}}, got {shown(data)}."
            )
        known = [entry.name for entry in fields(cls)]
        for key in data:
            if key not in known:
                raise unknown_name("attention setting", key, known)
        return cls(**data)
