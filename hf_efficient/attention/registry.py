"""The table of attention kinds: a name, and the module that computes it.

    variant = ATTENTIONS["local"](config, HeadShape(heads=12, kv_heads=12, dim=32))

`register_attention` adds a kind of your own; docs/attention.md has a worked example.
"""

from dataclasses import fields as fields_of

from ..errors import ConfigError, unknown_name
from .config import KINDS, AttentionConfig
from .kinds.additive import AdditiveAttention
from .kinds.kernel import KernelAttention
from .kinds.linear import LinearAttention
from .kinds.local import LocalAttention
from .kinds.local_linear import LocalLinearAttention
from .kinds.lsh import LshAttention
from .kinds.strided import StridedAttention
from .kinds.topk import TopkAttention
from .variant import AttentionVariant

ATTENTIONS: dict[str, type[AttentionVariant]] = {
    "local": LocalAttention,
    "linear": LinearAttention,
    "local_linear": LocalLinearAttention,
    "strided": StridedAttention,
    "lsh": LshAttention,
    "topk": TopkAttention,
    "additive": AdditiveAttention,
    "kernel": KernelAttention,
}


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
        own = "" if name in _BUILT_IN else ", or pass overwrite=True to replace it"
        raise ConfigError(f"There is an attention kind {name!r} already. Choose another name{own}.")
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
    KINDS[name], ATTENTIONS[name] = tuple(fields), variant


_BUILT_IN = frozenset(KINDS)
