"""Collectives with autograd that count what they send."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from parallel.stopwatch import Stopwatch

# torch 2.13 deprecates the old names, 2.11 has only those.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class CollectiveResults:
    """What collectives returned, so that a second forward pass need not send anything again.

    Within `recording`, what is started is kept; within `replaying`, nothing is sent or counted,
    and the calls return what was kept, in the same order.
    """

    def __init__(self) -> None:
        self.replays = False
        self._kept: list[Any] = []
        self._next = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        with self._in_use():
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        self.replays, self._next = True, 0
        with self._in_use():
            yield

    def keep(self, result: Any) -> None:
        self._kept.append(aliases(result))

    def next(self) -> Any:
        self._next += 1
        return aliases(self._kept[self._next - 1])

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        token = _results.set(self)
        try:
            yield
        finally:
            _results.reset(token)


_results: ContextVar[CollectiveResults | None] = ContextVar("_results", default=None)


def aliases(result: Any) -> Any:
    """Autograd writes into the tensors that an operation returns: keep, and hand out, aliases."""
    return tree_map_only(Tensor, lambda x: x.detach(), result)


def is_recording() -> bool:
    """Whether what is computed now is wanted again in a second forward pass."""
    results = _results.get()
    return results is not None and not results.replays


@contextmanager
def unrecorded() -> Iterator[None]:
    """Keep nothing of what is computed here for a second forward pass."""
    token = _results.set(None)
    try:
        yield
    finally:
        _results.reset(token)


def keep_as_one(compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """`compute()`; where a second forward pass takes results from the first, that takes these.

    What `compute` makes and receives on the way is not kept, and neither is sent again.
    """
    results = _results.get()
    if results is None:
        return compute()
    if results.replays:
        kept: tuple[Tensor, ...] = results.next()
        return kept
    with unrecorded():
        made = compute()
    results.keep(made)
    return made


class CollectiveError(RuntimeError):
    """A collective that did not complete: a rank died, or they do not call the same ones."""


class Communicator:
    """The collectives of one process group.

    Attributes:
        axis: the mesh axis that the group lies along, for errors and reports.
        calls: collectives started, forward and backward, by kind.
        bytes: bytes that this rank sent to other ranks, by kind; for reductions what the ring
            algorithm sends.
        waited: runs while nothing is computed because a collective has not arrived.
    """

    def __init__(self, group: dist.ProcessGroup, axis: str) -> None:
        self.group = group
        self.axis = axis
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.waited = Stopwatch()

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
        with self.naming("all_reduce"), self.waited.running(x.device):
            dist.all_reduce(x, op, group=self.group)
        return x

    def start_all_gather(self, x: Tensor, dim: int) -> "Pending":
        """Start `all_gather`, without autograd."""
        x = x.contiguous()
        out = x.new_empty(self.size, *x.shape)
        call = partial(all_gather_single, out.flatten(0, 1), x)
        sent_bytes = x.nbytes * (self.size - 1)
        return self._start("all_gather", call, sent_bytes, x, out, partial(_ranks_along, dim=dim))

    def start_reduce_scatter(self, x: Tensor, dim: int) -> "Pending":
        """Start `reduce_scatter`, without autograd."""
        x = x.unflatten(dim, (self.size, -1)).movedim(dim, 0).contiguous()
        out = torch.empty_like(x[0])
        call = partial(reduce_scatter_single, out, x.flatten(0, 1))
        return self._start("reduce_scatter", call, out.nbytes * (self.size - 1), x, out)

    def start_exchange(self, x: Tensor, received: Sequence[int], sent: Sequence[int]) -> "Pending":
        """Start `exchange`."""
        x = x.contiguous()
        out = x.new_empty(sum(received), *x.shape[1:])
        call = partial(dist.all_to_all_single, out, x, list(received), list(sent))
        sent_bytes = (sum(sent) - sent[self.rank]) * x[:1].nbytes
        return self._start("all_to_all", call, sent_bytes, x, out)

    def start_shift(self, x: Tensor, distance: int = 1) -> "Pending":
        """Start to send `x` to the rank `distance` further round the group, and to receive as much
        from the one that far back.
        """
        x = x.contiguous()
        out = torch.empty_like(x)
        call = partial(_send_and_receive, x, out, distance)
        return self._start("send", call, x.nbytes, x, out)

    def _start(
        self,
        kind: str,
        call: Callable[..., Any],
        sent_bytes: int,
        source: Tensor,
        out: Tensor,
        arrange: "Callable[[Tensor], Tensor] | None" = None,
    ) -> "Pending":
        results = _results.get()
        if results is not None and results.replays:
            return Pending(self, kind, None, source, results.next(), arrange)
        self._count(kind, sent_bytes)
        with self.naming(kind):
            work = call(group=self.group, async_op=True)
        if results is not None:
            results.keep(out)
        return Pending(self, kind, work, source, out, arrange)

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


class _Works(NamedTuple):
    """Several works that are waited for as one."""

    works: Sequence[dist.Work]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def _send_and_receive(
    x: Tensor, out: Tensor, distance: int, group: dist.ProcessGroup, async_op: bool
) -> _Works:
    assert async_op
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    to, back = (rank + distance) % size, (rank - distance) % size
    send = dist.P2POp(dist.isend, x, group=group, group_peer=to)
    receive = dist.P2POp(dist.irecv, out, group=group, group_peer=back)
    return _Works(dist.batch_isend_irecv([send, receive]))


def _ranks_along(out: Tensor, dim: int) -> Tensor:
    """[ranks, ...] -> [...] concatenated along `dim`; a view where what precedes `dim` is 1."""
    return out.movedim(0, dim).flatten(dim, dim + 1)


@dataclass(frozen=True)
class Pending:
    """A collective on its way; `source`, which it reads, lives at least as long."""

    comm: Communicator
    kind: str
    work: dist.Work | _Works | None
    source: Tensor
    out: Tensor
    arrange: Callable[[Tensor], Tensor] | None = None

    def wait(self) -> Tensor:
        """The result, once it has arrived (on a GPU: for what the current stream does next)."""
        if self.work is not None:
            with self.comm.naming(self.kind), self.comm.waited.running(self.out.device):
                self.work.wait()
        return self.arrange(self.out) if self.arrange else self.out


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
