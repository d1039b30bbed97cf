"""What `attention.py` measures: our kinds, dense attention, and what other packages offer for the same work.

A method is made for one length: `make_method("local", 8192)`. It says how it wants query, key and value [1,H,n,D] laid
out, which is done before the clock starts, so that nobody pays for another's layout. Attention modules that come with
projections (Longformer, BigBird, Reformer, Fastformer) get them replaced by the reading of given tensors: only the
attention is timed, and the outputs can be compared with ours.
"""

import contextlib
import importlib.metadata
import importlib.util
import math
import runpy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_efficient import AttentionConfig
from hf_efficient.attention.registry import ATTENTIONS
from hf_efficient.attention.variant import HeadShape

HEADS, DIM, WINDOW, BLOCK = 12, 64, 64, 64

CONFIGS = {  # what is measured of each kind, bidirectional and causal; arguments, since a kind may not exist yet
    "local": {"kind": "local", "window": WINDOW},
    "strided": {"kind": "strided", "block_size": BLOCK, "num_blocks": 7},
    "lsh": {"kind": "lsh", "block_size": BLOCK, "num_hashes": 2, "num_buckets": 32},
    "topk": {"kind": "topk", "block_size": BLOCK, "top_k": 8},
    "linear": {"kind": "linear", "feature_map": "elu"},
    "linear_relu": {"kind": "linear", "feature_map": "relu"},
    "linear_favor": {"kind": "linear", "feature_map": "favor", "feature_dim": DIM},
    "linear_hedgehog": {"kind": "linear", "feature_map": "hedgehog"},
    "local_linear": {"kind": "local_linear", "window": WINDOW, "feature_map": "hedgehog"},
    "additive": {"kind": "additive"},
    "kernel": {"kind": "kernel", "feature_dim": 16},
    "kernel_positions": {"kind": "kernel", "feature_dim": 0},
}
CAUSAL = "_causal"  # ends the name of a causal method


def as_given(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return query, key, value


def by_token(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[1,H,n,D] -> [1,n,H,D]."""
    return tuple(x.transpose(1, 2).contiguous() for x in tensors)


def hidden(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[1,H,n,D] -> [1,n,H*D], as a projection gives it."""
    return tuple(x.flatten(2) for x in by_token(*tensors))


def joined(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[1,H,n,D] three times -> one [1,n,3*H*D]."""
    return (torch.cat(hidden(*tensors), -1),)


def tied(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Queries that are the keys too, and the values: [H,n,D]."""
    return query[0], value[0]


def tied_hidden(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """The same as [1,n,H*D]."""
    return hidden(query, value)


def heads_apart(out: Tensor) -> Tensor:
    """[1,n,H*D] or [1,n,H,D] -> [1,H,n,D]."""
    return out.view(1, out.shape[1], HEADS, DIM).transpose(1, 2)


class Method(NamedTuple):
    """`call` of the tensors that `lay_out` makes from query, key and value; `read` brings its output to [1,H,n,D]."""

    call: Callable[..., Tensor]
    lay_out: Callable[..., tuple[Tensor, ...]] = as_given
    read: Callable[[Tensor], Tensor] = lambda out: out
    parameters: Iterable[nn.Parameter] = ()


class Peer(NamedTuple):
    """A method of others.

    `of`: the method of ours that does the same work; `exact`: it gives the same numbers; `package`: pip name;
    `forward_to`, `backward_to`: the longest length that is measured, and the `reason`.
    """

    make: Callable[[int], Method]
    of: str
    package: str
    exact: bool = False
    forward_to: float = math.inf
    backward_to: float = math.inf
    reason: str = ""


def our_names() -> list[str]:
    """The methods whose kind exists, bidirectional ones first."""
    bases = [name for name, config in CONFIGS.items() if config["kind"] in ATTENTIONS]
    return bases + [base + CAUSAL for base in bases]


def is_causal(name: str) -> bool:
    return PEERS[name].of.endswith(CAUSAL) if name in PEERS else name.endswith(CAUSAL)


def make_method(name: str, length: int) -> Method:
    """The method of this name, ready for sequences of `length`."""
    if name in PEERS:
        return PEERS[name].make(length)
    causal, base = name.endswith(CAUSAL), name.removesuffix(CAUSAL)
    if base == "dense":
        return Method(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    variant = make_variant(base)
    options = {"causal": causal, "scaling": None, "dropout": 0.0, "bias": None}
    return Method(lambda q, k, v: variant.attend(q, k, v, None, **options), parameters=list(variant.parameters()))


def make_variant(base: str, **changes) -> nn.Module:
    """The module of `CONFIGS[base]`, with its starting values."""
    config = AttentionConfig(**{**CONFIGS[base], **changes})
    variant = ATTENTIONS[config.kind](config, HeadShape(HEADS, HEADS, DIM))
    variant.reset_parameters()
    return variant


def transformers_window(length: int) -> Method:
    """SDPA with the mask that a transformers model with a sliding window makes, once for all layers."""
    from transformers.masking_utils import sdpa_mask

    mask = sdpa_mask(
        batch_size=1,
        q_length=length,
        kv_length=length,
        mask_function=lambda batch, head, q, kv: (q - kv).abs() <= WINDOW,
        allow_is_causal_skip=False,
    )
    return Method(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def flex_window(length: int) -> Method:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    mask = create_block_mask(lambda b, h, q, kv: (q - kv).abs() <= WINDOW, None, None, length, length, device="cpu")
    function = torch.compile(flex_attention, dynamic=False)
    return Method(lambda q, k, v: function(q, k, v, block_mask=mask))


class Given(nn.Module):
    """In the place of a projection: what was given, whatever it is applied to."""

    tensor: Tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.tensor


def transformers_longformer(length: int) -> Method:
    from transformers.models.longformer.modeling_longformer import LongformerConfig, LongformerSelfAttention

    size = {"hidden_size": HEADS * DIM, "num_attention_heads": HEADS, "num_hidden_layers": 1}
    module = LongformerSelfAttention(LongformerConfig(**size, attention_window=[2 * WINDOW]), 0).eval()
    module.query, module.key, module.value = Given(), Given(), Given()
    mask = torch.zeros(1, length)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        module.query.tensor = query.transpose(0, 1).clone()  # it is scaled in place
        module.key.tensor, module.value.tensor = key.transpose(0, 1), value.transpose(0, 1)
        options = {"is_index_masked": mask > 0, "is_index_global_attn": mask > 0, "is_global_attn": False}
        return module(query, mask, **options)[0]

    return Method(call, hidden, heads_apart)


def transformers_bigbird(length: int) -> Method:
    """3 window, 3 random and 2 global blocks: 8 blocks of 64 keys, as many as ours."""
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdConfig, BigBirdModel

    size = {"hidden_size": HEADS * DIM, "num_attention_heads": HEADS, "max_position_embeddings": length}
    module = BigBirdBlockSparseAttention(BigBirdConfig(**size, block_size=BLOCK, num_random_blocks=3)).eval()
    module.query, module.key, module.value = Given(), Given(), Given()
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, length), BLOCK)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        module.query.tensor, module.key.tensor, module.value.tensor = query, key, value
        return module(query, band, rows, columns, blocked, blocked)[0]

    return Method(call, hidden, heads_apart)


def transformers_reformer(length: int) -> Method:
    """Queries tied to the keys; every query sees its own chunk and the one before, 128 keys a round as ours."""
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention, ReformerConfig

    options = {"num_hashes": 2, "num_buckets": 32, "lsh_attn_chunk_length": BLOCK, "is_decoder": False}
    size = {"hidden_size": HEADS * DIM, "num_attention_heads": HEADS, "attention_head_size": DIM}
    module = LSHSelfAttention(ReformerConfig(**size, **options, lsh_attention_probs_dropout_prob=0.0)).eval()
    module.query_key, module.value = Given(), Given()

    def call(query: Tensor, value: Tensor) -> Tensor:
        module.query_key.tensor, module.value.tensor = query, value
        return module(query).hidden_states

    return Method(call, tied_hidden, heads_apart)


def reformer_pytorch(causal: bool) -> Method:
    from reformer_pytorch.reformer_pytorch import LSHAttention

    module = LSHAttention(bucket_size=BLOCK, n_hashes=2, causal=causal).eval()
    return Method(lambda qk, v: module(qk, v)[0], tied, lambda out: out.unsqueeze(0))


def local_attention_package(causal: bool) -> Method:
    """Causal, it counts `window` keys beside the token itself: one more than ours."""
    from local_attention import LocalAttention

    look = {"look_backward": 1, "look_forward": 0 if causal else 1}
    return Method(LocalAttention(window_size=WINDOW, causal=causal, exact_windowsize=True, **look).eval())


def performer_favor(causal: bool) -> Method:
    from performer_pytorch.performer_pytorch import FastAttention

    with contextlib.redirect_stdout(None):  # it says that there is no CUDA
        return Method(FastAttention(dim_heads=DIM, nb_features=DIM, causal=causal).eval())


def elu_features(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def performer_linear() -> Method:
    from performer_pytorch.performer_pytorch import linear_attention

    return Method(lambda q, k, v: linear_attention(elu_features(q), elu_features(k), v))


def fla_chunked() -> Method:
    """flash-linear-attention's own torch reference, read from its file: the package cannot be imported on CPU."""
    package = Path(importlib.util.find_spec("fla").origin).parent
    function = runpy.run_path(str(package / "ops/linear_attn/naive.py"))["naive_chunk_linear_attn"]

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return function(elu_features(query), elu_features(key), value, normalize=True)

    return Method(call, by_token, heads_apart)


def fast_transformer(length: int) -> Method:
    from fast_transformer_pytorch.fast_transformer_pytorch import FastAttention

    module = FastAttention(HEADS * DIM, heads=HEADS, dim_head=DIM).eval()
    module.to_qkv, module.to_out = nn.Identity(), nn.Identity()
    mask = torch.ones(1, length, dtype=torch.bool)
    return Method(lambda qkv: module(qkv, mask), joined, heads_apart, list(module.parameters()))


PEERS = {
    "transformers_window": Peer(
        transformers_window,
        "local",
        "transformers",
        exact=True,
        forward_to=16384,
        backward_to=8192,
        reason="time and mask grow with the square of the length",
    ),
    "transformers_longformer": Peer(transformers_longformer, "local", "transformers", exact=True),
    "flex_window": Peer(
        flex_window,
        "local",
        "torch",
        exact=True,
        backward_to=0,
        reason="FlexAttention has no backward on CPU (NotImplementedError)",
    ),
    "local_attention_package": Peer(
        lambda length: local_attention_package(False), "local", "local-attention", exact=True
    ),
    "local_attention_package_causal": Peer(
        lambda length: local_attention_package(True), "local_causal", "local-attention"
    ),
    "transformers_bigbird": Peer(
        transformers_bigbird,
        "strided",
        "transformers",
        forward_to=8192,
        backward_to=8192,
        reason="the module always makes a matrix of all weights: 13 GB at 16384 tokens",
    ),
    "transformers_reformer": Peer(transformers_reformer, "lsh", "transformers"),
    "reformer_pytorch": Peer(lambda length: reformer_pytorch(False), "lsh", "reformer-pytorch"),
    "reformer_pytorch_causal": Peer(lambda length: reformer_pytorch(True), "lsh_causal", "reformer-pytorch"),
    "performer_linear": Peer(lambda length: performer_linear(), "linear", "performer-pytorch", exact=True),
    "fla_chunked": Peer(lambda length: fla_chunked(), "linear_causal", "flash-linear-attention", exact=True),
    "performer_favor": Peer(lambda length: performer_favor(False), "linear_favor", "performer-pytorch"),
    "performer_favor_causal": Peer(
        lambda length: performer_favor(True),
        "linear_favor_causal",
        "performer-pytorch",
        backward_to=8192,
        reason="it keeps a 64 x 64 state for every token and head: 4 GB at 16384 tokens",
    ),
    "fast_transformer": Peer(fast_transformer, "additive", "fast-transformer-pytorch"),
}


def installed(name: str) -> str | None:
    """`package version` of a peer, or None."""
    package = PEERS[name].package
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return None
