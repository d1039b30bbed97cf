"""torch.compile takes a converted model whole: every kind of attention, and one family of each way to be built."""

import pytest
import torch

from hf_efficient import convert_attention

from ..attention.tiny import TINY, TINY_JOBS
from ..families import CASES, CAUSAL, TWO_STACKS, make_inputs, make_model, one_layer
from ..helpers import assert_close, selected

BY_DEFAULT = {
    ("bert", "topk"),
    ("modernbert", "lsh"),
    ("vit", "linear-hedgehog"),
    ("clip", "local-global"),
    ("llama", "local_linear"),
    ("gpt2", "kernel"),
    ("t5", "strided"),
    ("bart", "additive"),
    ("whisper", "linear-favor"),
}
JOBS = sorted({*BY_DEFAULT, *TINY_JOBS})


@pytest.mark.parametrize(("family", "name"), selected(JOBS, lambda *job: job in BY_DEFAULT))
def test_it_compiles_whole(family, name):
    torch._dynamo.reset()
    model = convert_attention(make_model(family, **one_layer(family)), TINY[name])
    inputs = make_inputs(family, CASES[family].paddings[0])
    if family in (*CAUSAL, *TWO_STACKS):
        inputs["use_cache"] = False
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for parameter in model.parameters():  # learned parts leave their starting values too
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        assert_close(compiled(**inputs)[0], model(**inputs)[0], 1e-5)
