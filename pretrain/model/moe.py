"""Mixture-of-experts feed-forward."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.config import MoEConfig
from pretrain.model.kernels.documents import Documents
from pretrain.model.kernels.experts import swiglu_mixture
from pretrain.model.kernels.slots import Slots, count_slots, queue_positions, sort_by_expert
from pretrain.model.mlp import SwiGLU
from pretrain.model.norm import upcast


class Routing(NamedTuple):
    """What one layer's router did: sums over the tokens of a call.

    Divided by the tokens of the global batch, `balance`, `z` and `entropy` are means over tokens.

    Attributes:
        balance: fp32 scalar with gradient, E * sum_e f_e P_e for each token.
        z: fp32 scalar with gradient, the squared logsumexp of each token's logits (Zoph et al.
            2022, arXiv:2202.08906, eq. 5).
        entropy: fp32 scalar, that of each token's probabilities, in nats.
        counts: [E] int64, the (token, choice) slots that chose each expert.
        dropped: int64 scalar, the slots over their expert's capacity.
    """

    balance: Tensor
    z: Tensor
    entropy: Tensor
    counts: Tensor
    dropped: Tensor


class Experts(nn.Module):
    """The weights of all experts.

    Attributes:
        compute: `(x, expert_weights, slots, gate_up, down) -> [M, d]`, see `swiglu_mixture`.
    """

    def __init__(self, n_experts: int, d_model: int, d_expert: int) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * d_expert, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, d_expert))
        self.compute = swiglu_mixture

    def forward(self, x: Tensor, expert_weights: Tensor, slots: Slots) -> Tensor:
        """x [M, d], expert_weights [M, k] -> [M, d], each token through the experts it chose."""
        return self.compute(x, expert_weights, slots, self.gate_up, self.down)


Finish = Callable[[], Tensor]


class MoE(nn.Module):
    """Top-k of E experts by softmax probability, plus an optional gated shared expert.

    Shazeer et al. 2017, arXiv:1701.06538; shared expert: Dai et al. 2024, arXiv:2401.06066.
    Routing is computed in fp32: bf16 logits would flip choices.

    Attributes:
        frequencies: [E] fp32, the experts' shares of the slots in the whole previous step.
        selection_bias: [E] fp32, added to the probabilities to choose by, and not to weigh by.
        dispatch: `(x [N, d], expert_indices [N, k], expert_weights [N, k], experts) -> finish`
            sends tokens to their experts, -1 to none; `finish()` gives their outputs' sum by
            weight, [N, d]. Expert parallelism replaces it, and what is computed before `finish`
            hides the journey.
        sum_over_sequence: counts [B, E] of the part of each row that is here -> of whole rows.
        queue: `(indices [B, T, k], n_experts, documents)` -> [B, T, k], how many earlier tokens
            of the row chose a slot's expert. Where rows are split, both are replaced.
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
        self.dispatch = partial(dispatch_locally, dropless=config.capacity_factor is None)
        self.sum_over_sequence: Callable[[Tensor], Tensor] = counts_of_whole_rows
        self.queue: Callable[[Tensor, int, Documents | None], Tensor] = queue_of_whole_rows

    def forward(self, x_btd: Tensor, documents: Documents | None = None) -> tuple[Tensor, Routing]:
        """x [B, T, d] -> [B, T, d]; `documents` are for `queue`, which needs them in split rows."""
        logits_bte = F.linear(upcast(x_btd), upcast(self.router.weight))
        probability_bte = logits_bte.softmax(-1)
        indices_btk, weights_btk = self._choose(probability_bte)
        counts_be = count_slots(indices_btk, self.config.n_experts)
        balance = self._balance(probability_bte, counts_be)
        indices_btk, dropped = self._drop(indices_btk, counts_be, documents)

        lse_bt = logits_bte.logsumexp(-1)
        z = lse_bt.square().sum()
        with torch.no_grad():
            entropy = (lse_bt - (probability_bte * logits_bte).sum(-1)).sum()

        tokens = (x_btd.flatten(0, 1), indices_btk.flatten(0, 1), weights_btk.flatten(0, 1))
        out_btd = self.mix(*tokens).view_as(x_btd)
        return out_btd, Routing(balance, z, entropy, counts_be.sum(0), dropped)

    def mix(self, x: Tensor, expert_indices: Tensor, expert_weights: Tensor) -> Tensor:
        """x [N, d] through the experts and weights [N, k] that were chosen -> [N, d].

        Each token is treated alone: any of them may be left to another call.
        """
        finish = self.dispatch(x, expert_indices, expert_weights, self.experts)
        shared = self._shared(x)
        out = finish()
        return out if shared is None else out + shared

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

    def _drop(
        self, indices_btk: Tensor, counts_be: Tensor, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        """The choices with -1 for those over capacity, and how many those are.

        In training, an expert takes ceil(capacity_factor * T k / E) slots of a row of T tokens,
        those of earlier tokens first (Fedus et al. 2021, arXiv:2101.03961, section 2.2). A slot
        that is dropped adds nothing to its token's sum, and the weights of the token's other
        slots stay as they are. Evaluation drops nothing.
        """
        if self.config.capacity_factor is None or not self.training:
            return indices_btk, counts_be.new_zeros(())
        slots_b = self.sum_over_sequence(counts_be).sum(-1)
        share_b = self.config.capacity_factor * slots_b.double() / self.config.n_experts
        place_btk = self.queue(indices_btk, self.config.n_experts, documents)
        over = place_btk >= share_b.ceil()[:, None, None]
        return indices_btk.masked_fill(over, -1), over.sum()

    def _shared(self, x: Tensor) -> Tensor | None:
        if self.shared_expert is None or self.shared_gate is None:
            return None
        gated: Tensor = torch.sigmoid(self.shared_gate(x)) * self.shared_expert(x)
        return gated


def counts_of_whole_rows(counts_be: Tensor) -> Tensor:
    """What `MoE.sum_over_sequence` is where no row is split."""
    return counts_be


def queue_of_whole_rows(indices_btk: Tensor, n_experts: int, documents: Documents | None) -> Tensor:
    """What `MoE.queue` is where no row is split."""
    return queue_positions(indices_btk, n_experts)


def dispatch_locally(
    x: Tensor, expert_indices: Tensor, expert_weights: Tensor, experts: Experts, dropless: bool
) -> Finish:
    """Send each token [N, d] through its k experts, all on this device.

    With `dropless` no choice is -1, and the host need not wait for their number.
    """
    n_slots = expert_indices.numel() if dropless else int((expert_indices >= 0).sum())
    slots = sort_by_expert(expert_indices, experts.n_experts, n_slots)
    return lambda: experts(x, expert_weights, slots)
