"""Block attention by the flash-attention 2 kernels that come with torch, for GPUs since Ampere."""

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention
_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _forward(query=q, key=k, value=v, dropout_p=0.0, is_causal=causal, scale=scale)
    return out, lse


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
    random_state = q.new_empty(2, dtype=torch.uint64)
    dq, dk, dv = _backward(
        grad_out=dout,
        query=q,
        key=k,
        value=v,
        out=out,
        # Read as if it were contiguous.
        logsumexp=lse.contiguous(),
        cum_seq_q=None,
        cum_seq_k=None,
        max_q=q.shape[2],
        max_k=k.shape[2],
        dropout_p=0.0,
        is_causal=causal,
        philox_seed=random_state,
        philox_offset=random_state,
        scale=scale,
    )
    return dq, dk, dv
