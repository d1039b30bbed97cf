"""What a user may ask of one attention layer.

    AttentionConfig(kind="local", window=64, global_tokens=1)

An `AttentionConfig` is plain data: it is written to config.json as a small dict and read back with the same checks.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ConfigError, unknown_name

KINDS = ("full", "local", "linear")
FEATURE_MAPS = ("elu",)
MAX_WINDOW = 1 << 20
MAX_GLOBAL_TOKENS = 4096

# The fields that mean something for each kind; the others must keep their default.
_USED = {"full": (), "local": ("window", "global_tokens"), "linear": ("feature_map",)}


@dataclass(frozen=True)
class AttentionConfig:
    """One layer's attention.

    Parameters:
        kind: `"full"` (softmax over all keys), `"local"` (softmax over a window, Longformer 2020 / Mistral) or
            `"linear"` (feature map instead of softmax, Katharopoulos 2020).
        window: for `local`, in tokens. Bidirectional: keys with |i - j| <= window. Causal: the last `window` keys
            including the token itself, as transformers' `sliding_window`.
        global_tokens: for `local`, the number of first tokens (padding not counted) that see all and are seen by all.
        feature_map: for `linear`, `"elu"`: elu(x) + 1.

    Raises:
        ConfigError: a value out of range, an unknown kind, or a field that the kind does not use.
    """

    kind: str = "full"
    window: int = 128
    global_tokens: int = 0
    feature_map: str = "elu"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("attention kind", self.kind, KINDS)
        if self.feature_map not in FEATURE_MAPS:
            raise unknown_name("feature_map", self.feature_map, FEATURE_MAPS)
        _check_range("window", self.window, 1, MAX_WINDOW)
        _check_range("global_tokens", self.global_tokens, 0, MAX_GLOBAL_TOKENS)
        for field in fields(self):
            unused = field.name != "kind" and field.name not in _USED[self.kind]
            if unused and getattr(self, field.name) != field.default:
                allowed = ", ".join(_USED[self.kind]) or "no other field"
                raise ConfigError(
                    f"{field.name}={getattr(self, field.name)!r} has no meaning for kind={self.kind!r}, "
                    f"which uses {allowed}. Remove it or choose another kind."
                )

    def to_dict(self) -> dict[str, Any]:
        """Only what the kind uses: `{"kind": "local", "window": 64, "global_tokens": 1}`."""
        used = ("kind", *_USED[self.kind])
        return {name: value for name, value in asdict(self).items() if name in used}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AttentionConfig":
        """Read back `to_dict`; an unknown key is an error that names the known ones."""
        if not isinstance(data, dict):
            raise ConfigError(f"An attention setting must be a mapping such as {{'kind': 'local'}}, got {data!r}.")
        known = [field.name for field in fields(cls)]
        for key in data:
            if key not in known:
                raise unknown_name("attention setting", key, known)
        return cls(**data)


def _check_range(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name} must be an integer from {low} to {high}, got {value!r}.")
