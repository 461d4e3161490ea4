"""Block attention by cuDNN, through torch. It builds a graph for every new shape."""

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _forward(
        query=q,
        key=k,
        value=v,
        attn_bias=None,
        compute_log_sumexp=True,
        dropout_p=0.0,
        is_causal=causal,
        scale=scale,
    )
    return out, lse.squeeze(-1)


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
    random_state = q.new_empty((), dtype=torch.int64)
    dq, dk, dv = _backward(
        grad_out=dout,
        query=q,
        key=k,
        value=v,
        out=out,
        logsumexp=lse.contiguous().unsqueeze(-1),
        philox_seed=random_state,
        philox_offset=random_state,
        attn_bias=None,
        cum_seq_q=None,
        cum_seq_k=None,
        max_q=q.shape[2],
        max_k=k.shape[2],
        dropout_p=0.0,
        is_causal=causal,
        scale=scale,
    )
    return dq, dk, dv
