"""The (token, choice) slots of a batch: counted, queued, and sorted by expert."""

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.model.kernels.rows import Copies


class Slots(NamedTuple):
    """The (token, choice) slots of M tokens with k choices each, in the order of their experts.

    Attributes:
        order: [S] int64, the slots' places among the M * k, sorted by expert, stably.
        counts: [E] int64, the slots of each expert, S in all.
        copies: the slots as rows that are copies of tokens.
    """

    order: Tensor
    counts: Tensor
    copies: Copies


def sort_by_expert(expert_indices: Tensor, n_experts: int, n_slots: int) -> Slots:
    """Sort the choices of tokens.

    Args:
        expert_indices: [M, k]; -1 chooses none.
        n_experts: E.
        n_slots: how many choose one.
    """
    choices = expert_indices.flatten()
    order = choices.argsort(stable=True)[len(choices) - n_slots :]
    counts = count_slots(choices[None] + 1, n_experts + 1)[0, 1:]
    rows = torch.full_like(choices, n_slots)
    rows[order] = torch.arange(n_slots, device=order.device)
    top_k = expert_indices.shape[1]
    return Slots(order, counts, Copies(order // top_k, rows.view_as(expert_indices)))


def count_slots(expert_indices: Tensor, n_experts: int) -> Tensor:
    """How often each row chose each expert: [B, ..., k] -> [B, E] int64."""
    slots = expert_indices.flatten(1)
    return slots.new_zeros(len(slots), n_experts).scatter_add_(1, slots, torch.ones_like(slots))


def queue_positions(expert_indices: Tensor, n_experts: int) -> Tensor:
    """How many earlier tokens of its row chose a slot's expert: [B, T, k] -> [B, T, k] int32."""
    batch, length, _ = expert_indices.shape
    chosen = expert_indices.new_zeros(batch, length, n_experts, dtype=torch.int32)
    chosen.scatter_(2, expert_indices, 1)
    return chosen.cumsum(1, dtype=torch.int32).gather(2, expert_indices) - 1
