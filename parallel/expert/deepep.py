"""Dispatch by DeepEP's kernels (github.com/deepseek-ai/DeepEP, 2.x), for GPUs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parallel.comm import Communicator
from pretrain.model.kernels.slots import sort_by_expert


def why_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why parallel.dispatcher = deepep cannot run, and what to do; None if it can."""
    instead = "parallel.dispatcher=all_to_all runs anywhere"
    if device.type != "cuda":
        return f"parallel.dispatcher = deepep needs CUDA, and this is {device.type}; {instead}"
    if dtype != torch.bfloat16:
        return (
            f"parallel.dispatcher = deepep carries bfloat16 only, and train.dtype is {dtype}; "
            f"{instead}"
        )
    try:
        from deep_ep import ElasticBuffer  # noqa: F401
    except ImportError as error:
        return (
            "parallel.dispatcher = deepep needs the package deep_ep 2.x, which is built from "
            f"github.com/deepseek-ai/DeepEP ({error}); {instead}"
        )
    return None


class DeepEPDispatch:
    """Takes the place of `moe.dispatch`, like `AllToAllDispatch`: same ranks, same experts.

    All layers share one, and so its buffer. The number of tokens [N] is the same on all ranks.
    """

    def __init__(self, comm: Communicator, n_experts: int) -> None:
        self.group = comm.group
        self.n_experts = n_experts
        self.experts_per_rank = n_experts // comm.size
        self.buffer: Any = None

    def __call__(
        self, x: Tensor, expert_indices: Tensor, expert_weights: Tensor, experts: Any
    ) -> Callable[[], Tensor]:
        """x [N, d], expert_indices and expert_weights [N, k] -> [N, d], when called again."""
        self._reserve(len(x), x.shape[1], expert_indices.shape[1])
        flight = _Flight(self.buffer)
        rows, weights = _Depart.apply(x, expert_weights, expert_indices, self.n_experts, flight)

        def finish() -> Tensor:
            arrived, arrived_weights = _Arrive.apply(rows, weights, flight)
            slots = sort_by_expert(
                flight.expert_indices,
                self.experts_per_rank,
                sum(flight.handle.num_recv_tokens_per_expert_list),
            )
            combined: Tensor = _Combine.apply(experts(arrived, arrived_weights, slots), flight)
            return combined

        return finish

    def _reserve(self, n_tokens: int, d_model: int, top_k: int) -> None:
        if self.buffer is None or self.buffer.num_max_tokens_per_rank < n_tokens:
            from deep_ep import ElasticBuffer

            self.buffer = ElasticBuffer(
                self.group,
                num_max_tokens_per_rank=n_tokens,
                hidden=d_model,
                num_topk=top_k,
                deterministic=True,
            )


class _Flight:
    """One dispatch: its layout serves the combine and the backward passes of both."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer
        self.handle: Any = None
        self.event: Any = None
        self.expert_indices: Any = None
        self.gradients: Any = None


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        expert_weights: Tensor,
        indices: Tensor,
        n_experts: int,
        flight: _Flight,
    ) -> tuple[Tensor, Tensor]:
        ctx.flight = flight
        rows, flight.expert_indices, arriving, flight.handle, flight.event = flight.buffer.dispatch(
            x.contiguous(),
            topk_idx=indices,
            topk_weights=expert_weights,
            num_experts=n_experts,
            async_with_compute_stream=True,
        )
        return rows, arriving

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.flight.event.current_stream_wait()
        return *ctx.flight.gradients, None, None, None


class _Arrive(torch.autograd.Function):
    """Waits; the gradients set out from here, and `_Depart` waits for them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, flight: _Flight) -> tuple[Tensor, Tensor]:
        ctx.flight = flight
        flight.event.current_stream_wait()
        return rows.view_as(rows), weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor, None]:
        flight = ctx.flight
        *flight.gradients, flight.event = flight.buffer.combine(
            grad[0].contiguous(),
            handle=flight.handle,
            topk_weights=grad[1].contiguous(),
            async_with_compute_stream=True,
        )
        return grad[0], grad[1], None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        out: Tensor = flight.buffer.combine(y.contiguous(), handle=flight.handle)[0]
        return out

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        buffer, handle = ctx.flight.buffer, ctx.flight.handle
        # By itself, DeepEP derives num_sms from num_experts before it takes that from the handle.
        dx = buffer.dispatch(grad[0].contiguous(), handle=handle, num_sms=handle.num_sms)[0]
        return dx, None
