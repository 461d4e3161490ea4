"""An all-to-all that travels while something else is computed, forward and backward."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.comm import Communicator, Pending


def begin_all_to_all(
    comm: Communicator, x: Tensor, received: Sequence[int], sent: Sequence[int]
) -> Callable[[], Tensor]:
    """Start `comm.all_to_all`; calling what is returned gives its result.

    Autograd goes back through the later operations first: the gradient sets out where the result
    was awaited, and travels while what was computed meanwhile is differentiated.
    """
    flight = _Flight(comm, received, sent)
    buffer = _Depart.apply(x, flight)

    def finish() -> Tensor:
        arrived: Tensor = _Arrive.apply(buffer, flight)
        return arrived

    return finish


class _Flight:
    """One all-to-all and, later, that of its gradient."""

    def __init__(self, comm: Communicator, received: Sequence[int], sent: Sequence[int]) -> None:
        self.comm = comm
        self.received = received
        self.sent = sent
        self.pending: Pending | None = None

    def arrive(self) -> Tensor:
        assert self.pending is not None
        out, self.pending = self.pending.wait(), None
        return out


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.pending = flight.comm.start_exchange(x, flight.received, flight.sent)
        return flight.pending.out

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.arrive(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.arrive()
        return buffer.view_as(buffer)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        flight = ctx.flight
        flight.pending = flight.comm.start_exchange(grad[0], flight.sent, flight.received)
        return grad[0], None
