"""Mixture-of-experts feed-forward, dropless."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.config import MoEConfig
from pretrain.model.kernels.experts import (
    combine_by_token,
    count_slots,
    grouped_swiglu,
    sort_by_expert,
)
from pretrain.model.mlp import SwiGLU
from pretrain.model.norm import upcast


class Routing(NamedTuple):
    """What a balance loss needs of one layer.

    Attributes:
        probability: [E] fp32 with gradient, the router's probabilities summed over the tokens.
        counts: [E] int64, the number of (token, choice) slots that each expert got.
    """

    probability: Tensor
    counts: Tensor


class Experts(nn.Module):
    """The weights of all experts.

    Attributes:
        compute: `(x, counts, gate_up, down) -> [N, d]`, see `grouped_swiglu`.
    """

    def __init__(self, n_experts: int, d_model: int, d_expert: int) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * d_expert, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, d_expert))
        self.compute = grouped_swiglu

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [N, d] sorted by expert, counts [E] rows of each -> [N, d]."""
        return self.compute(x, counts, self.gate_up, self.down)


class MoE(nn.Module):
    """Top-k of E experts by softmax probability, plus an optional gated shared expert.

    Shazeer et al. 2017, arXiv:1701.06538; shared expert: Dai et al. 2024, arXiv:2401.06066.
    Routing is computed in fp32: bf16 logits would flip choices.

    Attributes:
        dispatch: `(x [N, d], expert_indices [N, k], expert_weights [N, k], experts) -> [N, d]`;
            expert parallelism replaces it.
    """

    def __init__(self, d_model: int, config: MoEConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.renormalise = config.renormalise_top_k
        self.router = nn.Linear(d_model, config.n_experts, bias=False)
        self.experts = Experts(config.n_experts, d_model, config.d_expert)
        shared = config.d_shared_expert > 0
        self.shared_expert = SwiGLU(d_model, config.d_shared_expert) if shared else None
        self.shared_gate = nn.Linear(d_model, 1, bias=False) if shared else None
        self.dispatch = dispatch_locally

    def forward(self, x_btd: Tensor) -> tuple[Tensor, Routing]:
        x = x_btd.flatten(0, 1)
        probability = F.linear(upcast(x), upcast(self.router.weight)).softmax(-1)
        weights, indices = probability.topk(self.top_k, dim=-1)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        out = self.dispatch(x, indices, weights, self.experts)
        if self.shared_expert is not None and self.shared_gate is not None:
            out = out + torch.sigmoid(self.shared_gate(x)) * self.shared_expert(x)
        routing = Routing(probability.sum(0), count_slots(indices, self.experts.n_experts))
        return out.view_as(x_btd), routing


def dispatch_locally(
    x: Tensor, expert_indices: Tensor, expert_weights: Tensor, experts: Experts
) -> Tensor:
    """Send each token [N, d] through its k experts, all on this device, and sum by weight."""
    rows, slots = sort_by_expert(x, expert_indices, experts.n_experts)
    return combine_by_token(experts(rows, slots.counts), expert_weights, slots)
