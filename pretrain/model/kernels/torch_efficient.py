"""Block attention by torch's memory-efficient kernels (Rabe & Staats 2021, arXiv:2112.05682): for
float32 on GPUs, which flash-attention does not take.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.kernels.heads import per_query_head, sum_over_group

_forward = torch.ops.aten._scaled_dot_product_efficient_attention
_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward

# The kernels store, and expect, so many more numbers per head that a multiple of this is full.
_LSE_MULTIPLE = 32


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _forward(
        query=q,
        key=per_query_head(k, q.shape[1]),
        value=per_query_head(v, q.shape[1]),
        attn_bias=None,
        compute_log_sumexp=True,
        dropout_p=0.0,
        is_causal=causal,
        scale=scale,
    )
    return out, lse[..., : q.shape[2]]


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
    dq, dk, dv, _ = _backward(
        grad_out_=dout,
        query=q,
        key=per_query_head(k, q.shape[1]),
        value=per_query_head(v, q.shape[1]),
        attn_bias=None,
        # Read as if it were contiguous in the order [B, T, H, D], without a word otherwise.
        out=out.transpose(1, 2).contiguous().transpose(1, 2),
        logsumexp=F.pad(lse, (0, -q.shape[2] % _LSE_MULTIPLE), value=math.inf).contiguous(),
        philox_seed=random_state,
        philox_offset=random_state,
        dropout_p=0.0,
        grad_input_mask=[True, True, True, False],
        is_causal=causal,
        scale=scale,
    )
    return dq, sum_over_group(dk, k.shape[1]), sum_over_group(dv, v.shape[1])
