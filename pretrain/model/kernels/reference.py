"""Block attention as its definition, for any dtype and device: O(Tq * Tk) memory."""

import torch
from torch import Tensor

from pretrain.model.kernels.heads import per_query_head, sum_over_group


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, causal, scale)
    lse = scores.logsumexp(-1)
    v = per_query_head(v, q.shape[1]).to(scores.dtype)
    return ((scores - lse.unsqueeze(-1)).exp() @ v).to(q.dtype), lse


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
    probabilities = (_scores(q, k, causal, scale) - lse.unsqueeze(-1)).exp()
    dout = dout.to(lse.dtype)
    d_probabilities = dout @ per_query_head(v, q.shape[1]).to(lse.dtype).mT
    delta = (dout * out).sum(-1, keepdim=True)
    d_scores = probabilities * (d_probabilities - delta) * scale
    dq = d_scores @ per_query_head(k, q.shape[1]).to(lse.dtype)
    dk = sum_over_group(d_scores.mT @ q.to(lse.dtype), k.shape[1])
    dv = sum_over_group(probabilities.mT @ dout, v.shape[1])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.to(dtype) * scale) @ per_query_head(k, q.shape[1]).to(dtype).mT
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores
