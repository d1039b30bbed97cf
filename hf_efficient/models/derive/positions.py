"""The tables of absolute positions of a model, and the row of the first token: seen in a run.

positions_of(model, inputs)      # {"max_positions": "max_position_embeddings", "positions": ("embed_positions",), ...}
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..registry import text_config
from .observe import run


def positions_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `Family` says of absolute positions; nothing where the config says no limit."""
    config = text_config(model.config)
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return {}
    rows: dict[str, int] = {}
    base = model.base_model

    def note(name: str, args: tuple) -> None:
        ids = args[0] if args else None
        if isinstance(ids, Tensor) and ids.ndim and ids.shape[-1] > 1 and not ids.is_floating_point():
            last = ids.reshape(-1, ids.shape[-1])[-1]  # the second text has no padding
            if (last.diff() == 1).all():
                rows[name] = int(last[0])

    tables = {
        n: m for n, m in base.named_modules() if isinstance(m, nn.Embedding) and 0 <= m.num_embeddings - limit <= 8
    }
    hooks = [m.register_forward_pre_hook(lambda m, args, name=n: note(name, args)) for n, m in tables.items()]
    try:
        run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for name, table in tables.items():  # OPT adds its offset itself
        if name not in rows and "pos" in name and table.num_embeddings > limit:
            rows[name] = table.num_embeddings - limit
    entry: dict[str, Any] = {"max_positions": "max_position_embeddings", "positions": tuple(rows)}
    first, pad = max(rows.values(), default=0), getattr(config, "pad_token_id", None)
    if first and first == (pad or 0) + 1 and all(tables[name].num_embeddings == limit for name in rows):
        return entry | {"positions_after_pad": True}
    return entry | {"position_offset": first}
