"""What a model predicts at chosen places, and the cross-entropy there, of a sharded vocabulary."""

import torch
from torch import Tensor

from pretrain.model.kernels.cross_entropy import VocabularyShard

NOTHING = -1


@torch.no_grad()
def predict(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor]:
    """The likeliest token of each place, and the cross-entropy in nats of its label.

    The logits of `chunk` places exist at a time. Of equal logits the lowest id counts, whichever
    rank has it; where a logit is not finite, nothing is predicted. With `shard`, ranks exchange
    four numbers per place.

    Args:
        hidden: [n, d]
        weight: [V, d], or the rows of this rank.
        labels: [n] int64

    Returns:
        [n] int64, and [n] in float32, float64 for float64.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    predicted = torch.empty_like(labels)
    losses = torch.empty(labels.shape, dtype=dtype, device=labels.device)
    for start in range(0, len(labels), chunk):
        rows = slice(start, start + chunk)
        logits = (hidden[rows] @ weight.T).to(dtype)
        predicted[rows], losses[rows] = _of_logits(logits, labels[rows], shard)
    return predicted, losses


def _of_logits(
    logits: Tensor, labels: Tensor, shard: VocabularyShard | None
) -> tuple[Tensor, Tensor]:
    first = 0 if shard is None else shard.first
    row = labels - first
    is_here = (row >= 0) & (row < logits.shape[-1])
    row = row.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)
    target = logits.gather(-1, row).squeeze(-1).masked_fill(~is_here, -torch.inf)
    lse = logits.logsumexp(-1)
    best = logits.argmax(-1)
    highest = logits.gather(-1, best.unsqueeze(-1)).squeeze(-1)
    best = best + first
    if shard is not None:
        lse, target, highest = shard.gather(torch.stack([lse, target, highest])).unbind(1)
        lse, target = lse.logsumexp(0), target.amax(0)
        # The first of equal ranks, which has the lower ids.
        rank = highest.argmax(0, keepdim=True)
        best = shard.gather(best).gather(0, rank).squeeze(0)
    return best.where(lse.isfinite(), NOTHING), lse - target
