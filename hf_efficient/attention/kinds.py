"""The table of attention kinds: a name, and the module that computes it.

ATTENTIONS["local"](config, HeadShape(heads=12, kv_heads=12, dim=32))
"""

from .linear import LinearAttention
from .local import LocalAttention
from .variant import AttentionVariant

ATTENTIONS: dict[str, type[AttentionVariant]] = {
    "local": LocalAttention,
    "linear": LinearAttention,
}
