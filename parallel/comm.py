"""Collectives with autograd that count what they send."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 deprecates the old names, 2.11 has only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class CollectiveError(RuntimeError):
    """A collective that did not complete: a rank died, or they do not call the same ones."""


class Communicator:
    """The collectives of one process group.

    Attributes:
        axis: the mesh axis that the group lies along, for errors and reports.
        calls: collectives started, forward and backward, by kind.
        bytes: bytes that this rank sent to other ranks, by kind; for reductions what the ring
            algorithm sends.
    """

    def __init__(self, group: dist.ProcessGroup, axis: str) -> None:
        self.group = group
        self.axis = axis
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Every rank's `x`, concatenated along `dim`; differentiable.

        The ranks' gradients of the result are summed: each rank is to compute with it something
        that the others do not.
        """
        result: Tensor = _AllGather.apply(x, self, dim)
        return result

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part along `dim` of the sum over ranks of `x`; differentiable."""
        result: Tensor = _ReduceScatter.apply(x, self, dim)
        return result

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
        return self.start_exchange(x, received, sent).wait()

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """`x`, overwritten by its sum (or other reduction) over ranks; no autograd."""
        self._count("all_reduce", 2 * x.nbytes * (self.size - 1) // self.size)
        with self.naming("all_reduce"):
            dist.all_reduce(x, op, group=self.group)
        return x

    def start_all_gather(self, x: Tensor, dim: int) -> "Pending":
        """Start `all_gather`, without autograd."""
        x = x.contiguous()
        out = x.new_empty(self.size, *x.shape)
        self._count("all_gather", x.nbytes * (self.size - 1))
        with self.naming("all_gather"):
            work = _all_gather(out.flatten(0, 1), x, group=self.group, async_op=True)
        return Pending(self, "all_gather", work, x, out, lambda out: _ranks_along(out, dim))

    def start_reduce_scatter(self, x: Tensor, dim: int) -> "Pending":
        """Start `reduce_scatter`, without autograd."""
        x = x.unflatten(dim, (self.size, -1)).movedim(dim, 0).contiguous()
        out = torch.empty_like(x[0])
        self._count("reduce_scatter", out.nbytes * (self.size - 1))
        with self.naming("reduce_scatter"):
            work = _reduce_scatter(out, x.flatten(0, 1), group=self.group, async_op=True)
        return Pending(self, "reduce_scatter", work, x, out)

    def start_exchange(self, x: Tensor, received: Sequence[int], sent: Sequence[int]) -> "Pending":
        """Start `exchange`."""
        x = x.contiguous()
        out = x.new_empty(sum(received), *x.shape[1:])
        row_bytes = x[:1].nbytes
        self._count("all_to_all", (sum(sent) - sent[self.rank]) * row_bytes)
        with self.naming("all_to_all"):
            work = dist.all_to_all_single(
                out, x, list(received), list(sent), group=self.group, async_op=True
            )
        return Pending(self, "all_to_all", work, x, out)

    @contextmanager
    def naming(self, kind: str) -> Iterator[None]:
        """Tell in an error which collective failed, and between whom."""
        try:
            yield
        except RuntimeError as error:
            raise CollectiveError(
                f"{kind} along axis {self.axis} failed on rank {dist.get_rank()}; it takes part "
                f"with the ranks {dist.get_process_group_ranks(self.group)}: {error}"
            ) from error

    def _count(self, kind: str, sent_bytes: int) -> None:
        self.calls[kind] += 1
        self.bytes[kind] += sent_bytes


def _itself(out: Tensor) -> Tensor:
    return out


def _ranks_along(out: Tensor, dim: int) -> Tensor:
    """[ranks, ...] -> [...] concatenated along `dim`; a view where what precedes `dim` is 1."""
    return out.movedim(0, dim).flatten(dim, dim + 1)


@dataclass(frozen=True)
class Pending:
    """A collective on its way; `source`, which it reads, lives at least as long."""

    comm: Communicator
    kind: str
    work: dist.Work
    source: Tensor
    out: Tensor
    arrange: Callable[[Tensor], Tensor] = _itself

    def wait(self) -> Tensor:
        """The result, once it has arrived (on a GPU: for what the current stream does next)."""
        with self.comm.naming(self.kind):
            self.work.wait()
        return self.arrange(self.out)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, dim: int) -> Tensor:
        ctx.comm, ctx.dim = comm, dim
        return comm.start_all_gather(x, dim).wait()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.comm.start_reduce_scatter(grad[0], ctx.dim).wait(), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, dim: int) -> Tensor:
        ctx.comm, ctx.dim = comm, dim
        return comm.start_reduce_scatter(x, dim).wait()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.comm.start_all_gather(grad[0], ctx.dim).wait(), None, None


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
