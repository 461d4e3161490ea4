"""Mixture-of-experts feed-forward."""

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
    """What one layer's router did: sums over the tokens of a call.

    Divided by the tokens of the global batch, `balance` and `z` are means over tokens.

    Attributes:
        balance: fp32 scalar with gradient, E * sum_e f_e P_e for each token.
        z: fp32 scalar with gradient, the squared logsumexp of each token's logits (Zoph et al.
            2022, arXiv:2202.08906, eq. 5).
        counts: [E] int64, the (token, choice) slots that chose each expert.
        dropped: int64 scalar, the slots over their expert's capacity.
    """

    balance: Tensor
    z: Tensor
    counts: Tensor
    dropped: Tensor


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
        frequencies: [E] fp32, the experts' shares of the slots in the whole previous step.
        selection_bias: [E] fp32, added to the probabilities to choose by, and not to weigh by.
        dispatch: `(x [N, d], expert_indices [N, k], expert_weights [N, k], experts) -> [N, d]`;
            expert parallelism replaces it.
        sum_over_sequence: counts [B, E] of the rows' tokens here -> of the whole rows; replaced
            where ranks share rows.
    """

    frequencies: Tensor
    selection_bias: Tensor

    def __init__(self, d_model: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(d_model, config.n_experts, bias=False)
        self.experts = Experts(config.n_experts, d_model, config.d_expert)
        shared = config.d_shared_expert > 0
        self.shared_expert = SwiGLU(d_model, config.d_shared_expert) if shared else None
        self.shared_gate = nn.Linear(d_model, 1, bias=False) if shared else None
        even = torch.full((config.n_experts,), 1 / config.n_experts)
        self.register_buffer("frequencies", even, persistent=False)
        self.register_buffer("selection_bias", torch.zeros_like(even), persistent=False)
        self.dispatch = dispatch_locally
        self.sum_over_sequence = sum_over_whole_rows

    def forward(self, x_btd: Tensor) -> tuple[Tensor, Routing]:
        logits_bte = F.linear(upcast(x_btd), upcast(self.router.weight))
        probability_bte = logits_bte.softmax(-1)
        indices_btk, weights_btk = self._choose(probability_bte)
        counts_be = count_slots(indices_btk, self.config.n_experts)
        out = self.dispatch(
            x_btd.flatten(0, 1), indices_btk.flatten(0, 1), weights_btk.flatten(0, 1), self.experts
        ).view_as(x_btd)
        if self.shared_expert is not None and self.shared_gate is not None:
            out = out + torch.sigmoid(self.shared_gate(x_btd)) * self.shared_expert(x_btd)
        counts = counts_be.sum(0)
        return out, Routing(
            balance=self._balance(probability_bte, counts_be),
            z=logits_bte.logsumexp(-1).square().sum(),
            counts=counts,
            dropped=counts.new_zeros(()),
        )

    def _choose(self, probability_bte: Tensor) -> tuple[Tensor, Tensor]:
        """The k experts of each token and their weights: [B, T, k] each."""
        top_k = self.config.top_k
        if self.config.balance == "bias":
            indices = (probability_bte + self.selection_bias).topk(top_k, dim=-1).indices
            weights = probability_bte.gather(-1, indices)
        else:
            weights, indices = probability_bte.topk(top_k, dim=-1)
        if self.config.renormalise_top_k:
            weights = weights / weights.sum(-1, keepdim=True)
        return indices, weights

    def _balance(self, probability_bte: Tensor, counts_be: Tensor) -> Tensor:
        """E * sum_e f_e P_e, summed over the tokens.

        f are the frequencies of the whole previous step (Fedus et al. 2021, arXiv:2101.03961,
        eq. 4), so that the loss does not depend on the size of a microbatch; or those of the
        row, documents packed into it taken together (DeepSeek-V3, arXiv:2412.19437, eq. 17-20).
        """
        frequencies = self.frequencies.expand(counts_be.shape)
        if self.config.balance == "sequence":
            whole_be = self.sum_over_sequence(counts_be)
            frequencies = whole_be / whole_be.sum(-1, keepdim=True)
        probability_be = probability_bte.sum(1)
        return self.config.n_experts * (frequencies * probability_be).sum()


def sum_over_whole_rows(counts_be: Tensor) -> Tensor:
    """The counts of the whole rows where no rows are split."""
    return counts_be


def dispatch_locally(
    x: Tensor, expert_indices: Tensor, expert_weights: Tensor, experts: Experts
) -> Tensor:
    """Send each token [N, d] through its k experts, all on this device, and sum by weight."""
    rows, slots = sort_by_expert(x, expert_indices, experts.n_experts)
    return combine_by_token(experts(rows, slots.counts), expert_weights, slots)
