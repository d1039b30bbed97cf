"""Causal linear attention through the Triton kernels of flash-linear-attention, where they can serve.

    out_i = phi(q_i) sum_(j<=i) phi(k_j)^T v_j / phi(q_i) . sum_(j<=i) phi(k_j)

The kernel gives the numerator, running sums of the features the denominator. `pip install "hf-efficient[gpu]"` brings
the package; without it, on a CPU and for everything `use_fla` declines, `linear` is plain PyTorch.
HF_EFFICIENT_NO_FLA=1 turns this file off.
"""

import importlib.util
import os

import torch
from torch import Tensor

_INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("fla", "triton"))


def use_fla(query: Tensor, key: Tensor) -> bool:
    """Whether the kernels can serve: CUDA, bfloat16, T == S, not inside torch.compile or torch.export.

    They multiply float32 in less precision than that, and float16 cannot hold the features of `favor`.
    """
    if not query.is_cuda or not _INSTALLED or os.environ.get("HF_EFFICIENT_NO_FLA") == "1":
        return False
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return query.dtype == torch.bfloat16 and query.shape[2] == key.shape[2] > 1


def causal_by_kernels(phi_query: Tensor, phi_key: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """phi_query [B,H,T,M], phi_key [B,K,T,M], 0 at padded keys, and value [B,K,T,Dv] -> [B,H,T,Dv] in float32.

    Features and values are rounded to `dtype` for the kernel; all sums are in float32.
    """
    from fla.ops.linear_attn import chunk_linear_attn

    groups = phi_query.shape[1] // phi_key.shape[1]
    phi_query, phi_key, value = (x.to(dtype) for x in (phi_query, phi_key, value))
    total = phi_key.float().cumsum(2).repeat_interleave(groups, 1).mul(phi_query.float()).sum(-1, keepdim=True)
    inputs = phi_query, *(x.repeat_interleave(groups, 1) for x in (phi_key, value))
    # The kernel takes and gives [B, T, H, *].
    out, _ = chunk_linear_attn(*(x.transpose(1, 2).contiguous() for x in inputs), scale=1.0, normalize=False)
    return out.transpose(1, 2).float() / total.masked_fill(total == 0, 1)
