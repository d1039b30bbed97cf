"""The attention kinds by their names: the class of each, and how to add one of your own.

    variant = ATTENTIONS["local"](config, HeadShape(heads=12, kv_heads=12, dim=32))

The table itself is `KINDS` in config.py. `register_attention` adds a kind of your own; docs/attention.md has a worked
example.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields as fields_of

from ..errors import ConfigError, unknown_name
from ..io.lazy import load
from .config import KINDS, AttentionConfig, Kind
from .variant import AttentionVariant


class _Variants(Mapping[str, type[AttentionVariant]]):
    """`KINDS` as name -> class; the module of a kind is imported when its class is asked for."""

    def __getitem__(self, name: str) -> type[AttentionVariant]:
        variant = KINDS[name].variant
        if variant is None:
            raise KeyError(name)
        return load(variant) if isinstance(variant, str) else variant

    def __iter__(self) -> Iterator[str]:
        return (name for name, kind in KINDS.items() if kind.variant is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


ATTENTIONS = _Variants()


def register_attention(
    name: str, variant: type[AttentionVariant], *, fields: tuple[str, ...] = ("options",), overwrite: bool = False
) -> None:
    """Make `AttentionConfig(kind=name)` mean your own attention, in every function of the package.

    Parameters:
        name: the name in `AttentionConfig` and in config.json. Register it again before you load such a checkpoint.
        variant: a subclass of `AttentionVariant` with its own `attend`, and `macs` if models with it are pruned.
        fields: the fields of `AttentionConfig` that the kind uses; `options` is a mapping for whatever else it needs.
        overwrite: replace a kind of your own, as when a notebook cell runs again.

    Raises:
        ConfigError: a name that is taken or is no name, a class without `attend`, or an unknown field.
    """
    if not (isinstance(name, str) and name.isidentifier()):
        raise ConfigError(f"The name of an attention kind must be an identifier such as 'my_kind', got {name!r}.")
    if name in _BUILT_IN or (name in KINDS and not overwrite):
        or_replace = "" if name in _BUILT_IN else ", or pass overwrite=True to replace it"
        raise ConfigError(f"There is an attention kind {name!r} already. Choose another name{or_replace}.")
    is_variant = isinstance(variant, type) and issubclass(variant, AttentionVariant)
    if not is_variant or variant.attend is AttentionVariant.attend:
        raise ConfigError(
            f"{name!r} needs a subclass of AttentionVariant with an `attend` of its own, got {variant!r}."
        )
    if isinstance(fields, str):
        raise ConfigError(f"fields must be a tuple such as ({fields!r},), got {fields!r}.")
    known = [entry.name for entry in fields_of(AttentionConfig) if entry.name != "kind"]
    for field in fields:
        if field not in known:
            raise unknown_name("field of AttentionConfig", field, known)
    KINDS[name] = Kind(tuple(fields), variant)


_BUILT_IN = frozenset(KINDS)
