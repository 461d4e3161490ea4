"""Cross-entropy that never holds all logits, and the experts' balance loss."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """The summed cross-entropy of `hidden @ weight.T` against `labels`, in nats.

    The logits of `chunk` tokens exist at a time, and their gradient is taken while they do. The
    softmax and the sum are float32 whatever the type of `hidden`.

    Args:
        hidden: [..., d]
        weight: [V, d]
        labels: [...] int64; IGNORED where there is nothing to predict.

    Returns:
        float32 scalar.
    """
    total: Tensor = _ChunkedCrossEntropy.apply(
        hidden.flatten(0, -2), weight, labels.flatten(), chunk
    )
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        needs_grad = hidden.requires_grad or weight.requires_grad
        total = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden) if needs_grad else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows] @ weight.T).float()
            total += F.cross_entropy(logits, labels[rows], ignore_index=IGNORED, reduction="sum")
            if d_hidden is not None and d_weight is not None:
                d_logits = _cross_entropy_gradient(logits, labels[rows]).to(hidden.dtype)
                d_hidden[rows] = d_logits @ weight
                d_weight += d_logits.T @ hidden[rows]
        if needs_grad:
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad[0], (d_weight * grad[0]).to(ctx.weight_dtype), None, None


def _cross_entropy_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """softmax(logits) - one_hot(labels), zero where the label is IGNORED; overwrites logits."""
    gradient = torch.softmax(logits, -1, out=logits)
    is_predicted = (labels != IGNORED).unsqueeze(-1)
    one = is_predicted.to(gradient.dtype)
    gradient.scatter_add_(-1, labels.clamp_min(0).unsqueeze(-1), -one)
    return gradient.mul_(one)


def balance_loss(router_probability: Tensor, frequencies: Tensor, tokens: int) -> Tensor:
    """The mean over layers of E * sum_e f_e P_e (Fedus et al. 2021, arXiv:2101.03961, eq. 4).

    `f` are the frequencies of the whole previous optimizer step, so that the loss is the same for
    every layout and every number of microbatches, and the parts of a step add up.

    Args:
        router_probability: [layers, E], summed over some tokens of the global batch.
        frequencies: [layers, E], each row adds up to 1.
        tokens: in the whole global batch.
    """
    layers, experts = frequencies.shape
    if not layers:
        return router_probability.sum()
    return experts * (frequencies * router_probability).sum() / (tokens * layers)


def uniform_frequencies(layers: int, experts: int) -> Tensor:
    """The expert frequencies before the first step: [layers, E] float32."""
    return torch.full((layers, experts), 1 / max(experts, 1))


def expert_frequencies(counts: Tensor) -> Tensor:
    """Each expert's share of its layer's token-slots: counts [layers, E] -> float32 [layers, E]."""
    return (counts / counts.sum(-1, keepdim=True).clamp_min(1)).float()
