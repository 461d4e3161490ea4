"""What travels or waits while something else is computed, forward and backward.

Autograd goes back through operations in the reverse order of their creation. So what a forward
pass creates between the departure and the arrival of a collective is differentiated between the
departure and the arrival of the gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.comm import Pending


def begin(
    x: Tensor, start: Callable[[Tensor], Pending], start_backward: Callable[[Tensor], Pending]
) -> Callable[[], Tensor]:
    """Start a collective on `x`; calling what is returned gives its result.

    Args:
        start: starts it.
        start_backward: starts what makes of the result's gradient that of `x`.
    """
    flight = _Flight(start, start_backward)
    token = _Depart.apply(x, flight)

    def finish() -> Tensor:
        arrived: Tensor = _Arrive.apply(token, flight)
        return arrived

    return finish


class _Flight:
    """One collective and, later, that of its gradient."""

    def __init__(
        self, start: Callable[[Tensor], Pending], start_backward: Callable[[Tensor], Pending]
    ) -> None:
        self.start = start
        self.start_backward = start_backward
        self.pending: Pending | None = None

    def arrive(self) -> Tensor:
        assert self.pending is not None
        out, self.pending = self.pending.wait(), None
        return out


class _Depart(torch.autograd.Function):
    """Returns a token, which stands for what is on its way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.pending = flight.start(x)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.arrive(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.arrive()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        flight = ctx.flight
        flight.pending = flight.start_backward(grad[0])
        return grad[0].new_zeros(()), None


class LateGradient:
    """A linear layer, called once, whose weight's gradient is computed when its turn comes.

    Its place in the backward pass is that of its creation, not of the call: by then the gradient
    of x may be on its way.

    Args:
        weight: [out, in]
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        self.operands: tuple[Tensor, Tensor] | None = None
        self.token = _WeightGradient.apply(weight, self)
        self.was_called = False

    def __call__(self, x: Tensor) -> Tensor:
        assert not self.was_called
        self.was_called = True
        y: Tensor = _KeepOperands.apply(F.linear(x, self.weight), x.detach(), self.token, self)
        return y


class _KeepOperands(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, token: Tensor, late: LateGradient) -> Tensor:
        ctx.save_for_backward(x)
        ctx.late = late
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        # Replaced, not added: schedules that split the backward pass come here twice.
        ctx.late.operands = grad[0], x
        return grad[0], None, grad[0].new_zeros(()), None


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, late: LateGradient) -> Tensor:
        ctx.late = late
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        (dy, x), ctx.late.operands = ctx.late.operands, None
        return dy.flatten(0, -2).T @ x.flatten(0, -2), None
