"""Every family of `tests.families`, and some in other forms: a gated FFN, cross attention, more biases.

dense, inputs = make_form("gpt2-cross"), form_inputs("gpt2-cross")
"""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.families import CASES, CAUSAL, TWO_STACKS, Inputs, make_inputs, make_labels, make_model

# form -> family, what its config has beside `CASES`
FORMS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in CASES}
FORMS |= {
    "t5-gated": ("t5", {"feed_forward_proj": "gated-gelu"}),
    "dinov2-gated": ("dinov2", {"use_swiglu_ffn": True}),
    "gpt2-cross": ("gpt2", {"add_cross_attention": True, "n_inner": 48}),
    "bert-cross": ("bert", {"add_cross_attention": True, "is_decoder": True}),
    "modernbert-bias": ("modernbert", {"attention_bias": True, "mlp_bias": True, "norm_bias": True}),
}
GENERATING = [form for form, (name, _) in FORMS.items() if name in (*CAUSAL, *TWO_STACKS)]
LOSSES = [form for form, (name, _) in FORMS.items() if CASES[name].labels or name == "clip"]
CROSS = [form for form, (name, fields) in FORMS.items() if name in TWO_STACKS or "add_cross_attention" in fields]


def make_form(form: str) -> PreTrainedModel:
    torch.manual_seed(0)
    name, fields = FORMS[form]
    return make_model(name, **fields)


def form_inputs(form: str, seed: int = 0, side: str | None = "") -> Inputs:
    """Padded on the first side that the family takes, or on `side`."""
    torch.manual_seed(seed)
    name, fields = FORMS[form]
    inputs = make_inputs(name, CASES[name].paddings[0] if side == "" else side)
    return inputs | ({"encoder_hidden_states": torch.randn(2, 7, 16)} if "add_cross_attention" in fields else {})


def form_batches(form: str) -> list[Inputs]:
    """For calibration, with labels."""
    return [form_inputs(form, seed) | make_labels(FORMS[form][0]) for seed in range(2)]


def auto_class(form: str) -> Any:
    return getattr(transformers, CASES[FORMS[form][0]].auto)
