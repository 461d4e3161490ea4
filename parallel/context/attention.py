"""Softmax attention under `cp`: heads are exchanged inside groups of ranks, keys go round them.

Ulysses (Jacobs et al. 2023, arXiv:2309.14509) gives each rank of a group the tokens of all of
them, and a part of the heads. Between groups keys go round a ring, or travel as far as a window
sees. Without groups this is ring attention, with a single one it is Ulysses, else it is both (USP:
Fang & Zhao 2024, arXiv:2405.07719).
"""

from typing import Any

import torch
from torch import Tensor

from parallel.comm import Communicator
from parallel.context.documents import SplitDocuments
from parallel.context.ring import RingPlan, ring_attention
from parallel.context.window import WindowPlan, window_attention


class ContextAttention:
    """Takes the place of `attention.core`.

    Args:
        ring: the ranks that keys go round.
        ulysses: the consecutive ranks of `cp` that exchange heads; None where each has all.
    """

    def __init__(self, ring: Communicator, ulysses: Communicator | None = None) -> None:
        self.ring = ring
        self.ulysses = ulysses

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: SplitDocuments,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """q [B, H, t, D], k and v [B, Hkv, t, D], of this rank's tokens -> [B, H, t, D]."""
        if self.ulysses is None:
            return self._around_ring(q, k, v, documents, scale, window)
        exchange: HeadExchange = documents.plan(HeadExchange, self.ulysses, q.device)
        out = self._around_ring(*exchange.to_heads(q, k, v), exchange.documents, scale, window)
        return exchange.to_tokens(out)

    def _around_ring(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: SplitDocuments,
        scale: float,
        window: int | None,
    ) -> Tensor:
        if window is None:
            ring = documents.plan(RingPlan, self.ring.size)
            return ring_attention(q, k, v, ring, self.ring, scale=scale)
        fetched = documents.plan(WindowPlan, window, q.device)
        return window_attention(q, k, v, fetched, self.ring, scale=scale)


class HeadExchange:
    """Between some tokens of all heads and all tokens of some heads.

    A rank sends, for t tokens and n ranks, (n - 1) / n of t (H + 2 Hkv) D elements there and of
    t H D back, forward; the gradients are as many. Fewer key heads than ranks go to several of
    them.

    Attributes:
        documents: what the group knows of its tokens together.
    """

    def __init__(self, documents: SplitDocuments, comm: Communicator, device: torch.device) -> None:
        self.comm = comm
        self.documents = documents.joined(comm.size)
        first = documents.rank - documents.rank % comm.size
        # The group's tokens come rank by rank; computation wants them in the order of the row.
        orders = [
            torch.cat(
                [torch.from_numpy(layout.tokens_of(first + rank)) for rank in range(comm.size)]
            ).argsort()
            for layout in documents.layouts
        ]
        self.order = torch.stack(orders).to(device)
        self.back = self.order.argsort(dim=1)

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, heads, t, D] each -> [B, heads / ranks, ranks * t, D] each."""
        ranks = self.comm.size
        copies = max(1, ranks // k.shape[1])
        k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
        by_rank = torch.cat([x.unflatten(1, (ranks, -1)) for x in (q, k, v)], dim=2)
        each = [1] * ranks
        arrived = self.comm.all_to_all(by_rank.movedim(1, 0).contiguous(), each, each)
        x: Tensor = _Permute.apply(arrived.movedim(0, 2).flatten(2, 3), self.order, self.back)
        heads = [x.shape[1] - 2 * (k.shape[1] // ranks), *[k.shape[1] // ranks] * 2]
        q, k, v = x.split(heads, dim=1)
        return q, k, v

    def to_tokens(self, out: Tensor) -> Tensor:
        """[B, H / ranks, ranks * t, D] -> [B, H, t, D]."""
        ranks = self.comm.size
        by_rank: Tensor = _Permute.apply(out, self.back, self.order)
        by_rank = by_rank.unflatten(2, (ranks, -1)).movedim(2, 0).contiguous()
        each = [1] * ranks
        return self.comm.all_to_all(by_rank, each, each).movedim(0, 1).flatten(1, 2)


class _Permute(torch.autograd.Function):
    """x [B, H, T, D] with the tokens of row b in the order `order[b]`; `back` undoes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return _ordered(x, order)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        return _ordered(grad[0], ctx.back), None, None


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    rows = zip(x, order, strict=True)
    return torch.stack([row.index_select(1, places) for row, places in rows])
