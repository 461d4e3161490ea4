"""A mixture of experts, one expert at a time: for CPUs, where an expert's tokens fit the cache."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.model.kernels.needed import as_inner_nodes, is_needed
from pretrain.model.kernels.slots import Slots


def looped_mixture(
    x: Tensor, expert_weights: Tensor, slots: Slots, gate_up: Tensor, down: Tensor
) -> Tensor:
    """See `experts.swiglu_mixture`. Sums over experts are in fp32 or wider."""
    weights = expert_weights.flatten()[slots.order].to(x.dtype).unsqueeze(-1)
    x, weights, gate_up, down = as_inner_nodes(x, weights, gate_up, down)
    mixture: Tensor = _LoopedMixture.apply(
        x, weights, gate_up, down, slots.copies.token, slots.counts
    )
    return mixture


class _LoopedMixture(torch.autograd.Function):
    """Saves the gate and up projections; rows of `x` are copied for one expert at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        token: Tensor,
        counts: Tensor,
    ) -> Tensor:
        out, projected = _mix(x, weights, token, counts, gate_up, down)
        ctx.save_for_backward(x, weights, token, counts, projected, gate_up, down)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        of_inputs = is_needed(ctx, 0) or is_needed(ctx, 1)
        of_experts = is_needed(ctx, 2) or is_needed(ctx, 3)
        gradients = _mix_backward(d_out, *ctx.saved_tensors, of_inputs, of_experts)
        needed = (of_inputs, of_inputs, of_experts, of_experts)
        return *(g if n else None for g, n in zip(gradients, needed, strict=True)), None, None


@torch.library.custom_op("farspan::looped_mixture", mutates_args=())
def _mix(
    x: Tensor, weights: Tensor, token: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    """The mixture [M, d], and what the gate and up projections gave [S, 2 * I].

    One operation to dispatch modes, so that activation recompute can keep its results.
    """
    projected = x.new_empty(len(token), gate_up.shape[1])
    out = torch.zeros_like(x, dtype=_sum_dtype(x))
    for e, rows in _experts(counts):
        torch.mm(x.index_select(0, token[rows]), gate_up[e].T, out=projected[rows])
        gate, up = projected[rows].chunk(2, dim=-1)
        hidden = F.silu(gate).mul_(up).mul_(weights[rows])
        out.index_add_(0, token[rows], (hidden @ down[e].T).to(out.dtype))
    return out.to(x.dtype), projected


@_mix.register_fake
def _(
    x: Tensor, weights: Tensor, token: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(len(token), gate_up.shape[1])


@torch.library.custom_op("farspan::looped_mixture_backward", mutates_args=())
def _mix_backward(
    d_out: Tensor,
    x: Tensor,
    weights: Tensor,
    token: Tensor,
    counts: Tensor,
    projected: Tensor,
    gate_up: Tensor,
    down: Tensor,
    of_inputs: bool,
    of_experts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x and weights, of gate_up and down; nothing for a pair not asked for."""
    d_x = _zeros_if(of_inputs, x, _sum_dtype(x))
    d_weights = _zeros_if(of_inputs, weights)
    d_gate_up, d_down = _zeros_if(of_experts, gate_up), _zeros_if(of_experts, down)
    for e, rows in _experts(counts):
        gate, up = projected[rows].chunk(2, dim=-1)
        activated = F.silu(gate)
        hidden = activated * up
        d_y = d_out.index_select(0, token[rows])
        d_hidden = d_y @ down[e]
        if of_inputs:
            d_weights[rows] = torch.linalg.vecdot(d_hidden, hidden).unsqueeze(-1)
        if of_experts:
            torch.mm(d_y.T, hidden.mul_(weights[rows]), out=d_down[e])

        d_hidden.mul_(weights[rows])
        d_projected = torch.empty_like(projected[rows])
        d_gate, d_up = d_projected.chunk(2, dim=-1)
        torch.mul(d_hidden, activated, out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(d_hidden.mul_(up), gate))
        if of_experts:
            torch.mm(d_projected.T, x.index_select(0, token[rows]), out=d_gate_up[e])
        if of_inputs:
            d_x.index_add_(0, token[rows], (d_projected @ gate_up[e]).to(d_x.dtype))
    return d_x.to(x.dtype), d_weights, d_gate_up, d_down


@_mix_backward.register_fake
def _(
    d_out: Tensor,
    x: Tensor,
    weights: Tensor,
    token: Tensor,
    counts: Tensor,
    projected: Tensor,
    gate_up: Tensor,
    down: Tensor,
    of_inputs: bool,
    of_experts: bool,
) -> tuple[Tensor, ...]:
    needed = (of_inputs, of_inputs, of_experts, of_experts)
    tensors = (x, weights, gate_up, down)
    return tuple(_zeros_if(n, like) for n, like in zip(needed, tensors, strict=True))


def _experts(counts: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, with those rows."""
    start = 0
    for expert, size in enumerate(counts.tolist()):
        if size:
            yield expert, slice(start, start + size)
        start += size


def _zeros_if(needed: bool, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.zeros_like(like, dtype=dtype) if needed else like.new_empty(0)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
