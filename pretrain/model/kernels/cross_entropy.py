"""Cross-entropy that never holds all logits, of a whole or a sharded vocabulary."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class VocabularyShard:
    """Which rows of the output embedding are here, when several ranks share them.

    Attributes:
        first: the token id of the first row.
        gather: a tensor [...] of each rank -> [ranks, ...].
    """

    first: int
    gather: Callable[[Tensor], Tensor]


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int,
    shard: VocabularyShard | None = None,
    losses: Tensor | None = None,
) -> Tensor:
    """The summed cross-entropy of `hidden @ weight.T` against `labels`, in nats.

    The logits of `chunk` tokens exist at a time, and their gradient is taken while they do. The
    softmax and the sum are float32 whatever the type of `hidden` (float64 for float64). With
    `shard`, ranks exchange two numbers per token (Shoeybi et al. 2019, arXiv:1909.08053, section
    3); all have the whole loss, and each the part of the gradient of `hidden` that comes from its
    rows: the sum over ranks is the whole gradient.

    Args:
        hidden: [..., d]
        weight: [V, d], or the rows of this rank.
        labels: [...] int64; IGNORED where there is nothing to predict. One that no rank has a row
            for makes the loss infinite.
        losses: [...] of the type of the softmax, is overwritten with what each token adds.

    Returns:
        float32 scalar.
    """
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total: Tensor = _ChunkedCrossEntropy.apply(
        hidden.flatten(0, -2),
        weight,
        labels.flatten(),
        chunk,
        shard,
        None if losses is None else losses.view(-1),
        needs_grad,
    )
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        shard: VocabularyShard | None,
        losses: Tensor | None,
        needs_grad: bool,
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=dtype)
        d_hidden = torch.empty_like(hidden) if needs_grad else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if needs_grad else None
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows] @ weight.T).to(dtype)
            loss, d_logits = _losses_and_gradient(logits, labels[rows], shard)
            total += loss.sum()
            if losses is not None:
                losses[rows] = loss
            if d_hidden is not None and d_weight is not None:
                d_logits = d_logits.to(hidden.dtype)
                d_hidden[rows] = d_logits @ weight
                d_weight += d_logits.T @ hidden[rows]
        if needs_grad:
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad[0], (d_weight * grad[0]).to(ctx.weight_dtype), *(None,) * 5


def _losses_and_gradient(
    logits: Tensor, labels: Tensor, shard: VocabularyShard | None
) -> tuple[Tensor, Tensor]:
    """Each token's cross-entropy; softmax(logits) - one_hot(labels), which overwrites logits."""
    row = (labels if shard is None else labels - shard.first).unsqueeze(-1)
    is_here = (row >= 0) & (row < logits.shape[-1])
    row = row.clamp(0, logits.shape[-1] - 1)
    is_predicted = (labels != IGNORED).unsqueeze(-1)

    target = logits.gather(-1, row).masked_fill_(~is_here, -torch.inf)
    highest = logits.amax(-1, keepdim=True)
    exponentials = logits.sub_(highest).exp_()
    lse = exponentials.sum(-1, keepdim=True).log_().add_(highest)
    if shard is not None:
        lse_of_ranks, target_of_ranks = shard.gather(torch.stack([lse, target])).unbind(1)
        lse, target = lse_of_ranks.logsumexp(0), target_of_ranks.amax(0)

    gradient = exponentials.mul_((highest - lse).exp_() * is_predicted)
    gradient.scatter_add_(-1, row, -(is_here & is_predicted).to(gradient.dtype))
    return (lse - target).where(is_predicted, 0).squeeze(-1), gradient
