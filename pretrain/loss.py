"""Cross-entropy that never holds all logits."""

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
