"""The feed-forwards of all experts at once, over tokens sorted by expert."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_swiglu(x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """down_e(silu(gate_e(x)) * up_e(x)) for each token's expert e.

    Args:
        x: [N, d], sorted by expert; N may be 0.
        counts: [E] integers, the number of rows of each expert, N in all; any may be 0.
        gate_up: [E, 2 * I, d], the gate projection's rows before the up projection's.
        down: [E, d, I]. d and I are multiples of 16 bytes (4 in fp32, 8 in bf16).

    Returns:
        [N, d].
    """
    offsets = counts.cumsum(0).to(torch.int32)
    gate, up = _grouped_linear(x, gate_up, offsets).chunk(2, dim=-1)
    out = _grouped_linear(F.silu(gate) * up, down, offsets)
    if out.requires_grad:
        out.register_hook(_with_own_strides)
    return out


def _with_own_strides(grad: Tensor) -> Tensor:
    """grouped_mm's backward refuses an expanded gradient (a sum gives one), even without rows."""
    if 0 in grad.stride():
        return grad.clone(memory_format=torch.contiguous_format)
    return grad.contiguous()


def _grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x W_e^T for the rows x[offsets[e - 1] : offsets[e]] of each expert e; weight [E, out, in]."""
    if x.dtype != torch.float64:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    groups = x.tensor_split(offsets[:-1].tolist())
    return torch.cat([F.linear(group, w) for group, w in zip(groups, weight, strict=True)])


def count_slots(expert_indices: Tensor, n_experts: int) -> Tensor:
    """How often each row chose each expert: [B, ..., k] -> [B, E] int64."""
    slots = expert_indices.flatten(1)
    return slots.new_zeros(len(slots), n_experts).scatter_add_(1, slots, torch.ones_like(slots))


class Slots(NamedTuple):
    """The (token, choice) slots of a batch in the order of their experts.

    Attributes:
        order: [N * k] int64, the slots sorted by expert, stably.
        inverse: [N * k] int64, the permutation that undoes it.
        counts: [E] int64, the slots of each expert.
    """

    order: Tensor
    inverse: Tensor
    counts: Tensor


def sort_by_expert(x: Tensor, expert_indices: Tensor, n_experts: int) -> tuple[Tensor, Slots]:
    """Repeat each token for its k experts: x [N, d], expert_indices [N, k] -> rows [N * k, d]."""
    order = expert_indices.flatten().argsort(stable=True)
    counts = count_slots(expert_indices[None], n_experts)[0]
    slots = Slots(order, order.argsort(), counts)
    repeated = x[:, None].expand(-1, expert_indices.shape[1], -1).flatten(0, 1)
    return permute_rows(repeated, slots.order, slots.inverse), slots


def combine_by_token(rows: Tensor, expert_weights: Tensor, slots: Slots) -> Tensor:
    """Sum the k results of each token by weight: rows [N * k, d], weights [N, k] -> [N, d]."""
    by_token = permute_rows(rows, slots.inverse, slots.order)
    by_choice = by_token.unflatten(0, (-1, expert_weights.shape[1]))
    return torch.einsum("nk,nkd->nd", expert_weights.to(rows.dtype), by_choice)


def permute_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x[order], for a permutation and its inverse.

    The backward gathers too, where that of indexing adds atomically: slower, and not bitwise
    reproducible.
    """
    permuted: Tensor = _PermuteRows.apply(x, order, inverse)
    return permuted


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None
