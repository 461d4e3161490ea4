"""Collectives with autograd that count what they send."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Communicator:
    """The collectives of one process group.

    Attributes:
        calls: collectives started, forward and backward.
        bytes: bytes this rank sent to other ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.calls = 0
        self.bytes = 0

    def all_to_all(self, x: Tensor, received: Sequence[int], sent: Sequence[int]) -> Tensor:
        """Send consecutive rows of `x` to the ranks of the group; differentiable.

        Args:
            x: [sum(sent), ...]
            received: rows that come from each rank.
            sent: rows that go to each rank.

        Returns:
            [sum(received), ...], in the order of the ranks they came from.
        """
        result: Tensor = _AllToAll.apply(x, self, received, sent)
        return result

    def exchange(self, x: Tensor, received: Sequence[int], sent: Sequence[int]) -> Tensor:
        """`all_to_all` without autograd."""
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=self.group)
        self.calls += 1
        row_bytes = x[:1].numel() * x.element_size()
        self.bytes += (sum(sent) - sent[self.rank]) * row_bytes
        return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, comm: Communicator, received: Sequence[int], sent: Sequence[int]
    ) -> Tensor:
        ctx.comm, ctx.received, ctx.sent = comm, received, sent
        return comm.exchange(x, received, sent)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.comm.exchange(grad[0], ctx.sent, ctx.received), None, None, None
