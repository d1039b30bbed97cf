"""Training by low-rank adapters (LoRA, Hu et al. 2021, by PEFT): the weights stay as they are, and what was learned is
added to them in the end, so that the result is of the class that it was, with no adapter to load.

- distill: {max_steps: 300, lora: {r: 16, alpha: 32, targets: all-linear}}

The optimizer then holds the adapters alone, which is what memory is saved by.
"""

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .settings import Settings, integer, ruled

ALL = "all-linear"


@dataclass(frozen=True)
class Lora(Settings):
    """`targets`: ends of the names of linears, such as `[q_proj, v_proj]`; `all-linear`: all but the output head."""

    r: int = integer(16, 1, 4096)
    alpha: int = integer(32, 1, 1 << 16)  # what was learned is multiplied by alpha / r
    targets: Any = ruled(
        ALL,
        f"{ALL}, or a list of names of linears such as [q_proj, v_proj]",
        lambda value: (
            value == ALL or (isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value))
        ),
    )

    def adapted(self, model: Any) -> Any:
        """`model` with adapters, which alone are trained; they change nothing yet.

        Raises:
            ConfigError: no linear has such a name, or the model has zeros that must stay.
        """
        from peft import LoraConfig, get_peft_model

        from ..pruning.gradual.zeros import was_sparsified

        if was_sparsified(model):
            raise ConfigError(
                "lora fills the zeros of pruned weights when it is added to them. Leave lora out, or prune heads, "
                "neurons or layers instead of weights."
            )
        try:
            return get_peft_model(model, LoraConfig(r=self.r, lora_alpha=self.alpha, target_modules=self.targets))
        except ValueError as error:
            raise ConfigError(f"lora.targets: {' '.join(str(error).split())[:300]}") from error


def merged(model: Any) -> Any:
    """The model of before, the adapters added to its weights."""
    return model.merge_and_unload()
