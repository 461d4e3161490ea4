"""Block attention by flash-attn 3 (Shah et al. 2024, arXiv:2407.08608), for Hopper GPUs.

Its operators are called themselves: the functions around them change from version to version.
"""

from typing import Any

import torch
from torch import Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _operators().fwd(
        q=_by_token(q),
        k=_by_token(k),
        v=_by_token(v),
        softmax_scale=scale,
        is_causal=causal,
        num_splits=1,
    )
    return out.transpose(1, 2), lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = (_by_token(x) for x in (dout, q, k, v, out))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _operators().bwd(
        dout=dout,
        q=q,
        k=k,
        v=v,
        out=out,
        softmax_lse=lse.contiguous(),
        dq=dq,
        dk=dk,
        dv=dv,
        softmax_scale=scale,
        is_causal=causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _operators() -> Any:
    import flash_attn_3._C  # noqa: F401 (registers them)

    return torch.ops.flash_attn_3


def _by_token(x: Tensor) -> Tensor:
    """[B, H, T, D] as [B, T, H, D] whose last dimension is contiguous."""
    x = x.transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()
