"""A mixture of experts by grouped matrix products, without a word to the host: for GPUs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.kernels.rows import repeat_rows, sum_rows
from pretrain.model.kernels.slots import Slots


def grouped_mixture(
    x: Tensor, expert_weights: Tensor, slots: Slots, gate_up: Tensor, down: Tensor
) -> Tensor:
    """See `experts.swiglu_mixture`."""
    offsets = slots.counts.cumsum(0, dtype=torch.int32)
    weights = expert_weights.flatten()[slots.order].to(x.dtype).unsqueeze(-1)
    rows = repeat_rows(x, slots.copies)
    gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up * weights, down.transpose(1, 2), offs=offsets)
    return sum_rows(y, slots.copies)
