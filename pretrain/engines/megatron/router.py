"""farspan's router in megatron-core's layer of experts."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from pretrain.model.config import MoEConfig


class Router(TopKRouter):
    """Top-k by softmax probability, balanced by the frequencies of the whole previous step.

    megatron-core's balance losses take the frequencies of a microbatch, a sequence, or what has
    come of the step so far, and so depend on how a batch is cut; see `pretrain.model.moe`.

    Its own state is no buffer, which a model in bf16 would round.

    Attributes:
        frequencies: [E] fp32, each expert's share of the slots in the step before.
        counts: [E] int64, slots of each expert on this rank since the step began.
        sums: [3] float64, balance, z and entropy as in `pretrain.model.moe.Routing`, of this rank's
            tokens since the step began.
        loss_share: what a token's balance weighs, as `finalize_model_grads` divides the sum over
            tokens and layers by the number of loss tokens alone.
    """

    def __init__(
        self,
        moe: MoEConfig,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.moe = moe
        device = torch.cuda.current_device()
        self.frequencies = torch.full((moe.n_experts,), 1 / moe.n_experts, device=device)
        self.counts = torch.zeros(moe.n_experts, dtype=torch.int64, device=device)
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.loss_share = 1 / config.num_layers

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [t, B, E] -> probabilities and choices [t * B, E], 0 and False of others."""
        assert padding_mask is None, "farspan has no padding"
        logits = logits.reshape(-1, self.moe.n_experts)
        probability = logits.softmax(-1)
        weights, indices = probability.topk(self.moe.top_k, dim=-1)
        if self.moe.renormalise_top_k:
            weights = weights / weights.sum(-1, keepdim=True)
        chosen = torch.zeros_like(probability, dtype=torch.bool).scatter(1, indices, True)
        weights = torch.zeros_like(probability).scatter(1, indices, weights)
        if self.training and torch.is_grad_enabled():
            self.counts += chosen.sum(0)
            weights = MoEAuxLossAutoScaler.apply(weights, self._auxiliary_loss(logits, probability))
        return weights, chosen

    def _auxiliary_loss(self, logits: Tensor, probability: Tensor) -> Tensor:
        """The balance loss (Fedus et al. 2021, arXiv:2101.03961, eq. 4) and the z-loss."""
        lse = logits.logsumexp(-1)
        balance = self.moe.n_experts * (self.frequencies * probability.sum(0)).sum()
        z = lse.square().sum()
        with torch.no_grad():
            entropy = (lse - (probability * logits).sum(-1)).sum()
            self.sums += torch.stack([balance, z, entropy])
        return (self.moe.aux_loss * balance + self.moe.z_loss * z) * self.loss_share


def routers_of(models: list[Any]) -> dict[int, Router]:
    """Those of this rank's layers, by the layer's number in the whole model."""
    routers = [module for gpt in models for module in gpt.modules() if isinstance(module, Router)]
    return {router.layer_number - 1: router for router in routers}


def begin_step(routers: Mapping[int, Router], loss_tokens: int, tokens: int) -> None:
    """Let losses be means over the `tokens` of a global batch, `loss_tokens` of them with a loss.

    Call it before the forward pass.
    """
    for router in routers.values():
        router.loss_share = loss_tokens / (tokens * router.config.num_layers)
        router.counts.zero_()
        router.sums.zero_()


def measured(routers: Mapping[int, Router], n_layers: int, moe: MoEConfig) -> Tensor:
    """What this rank's tokens add, as `pretrain.objective.measure_routers` has it: float64
    [L, 4 + E], nothing for layers of other ranks.
    """
    device = torch.cuda.current_device()
    layers = n_layers if moe.n_experts else 0
    found = torch.zeros(layers, 4 + moe.n_experts, dtype=torch.float64, device=device)
    for number, router in routers.items():
        # Between them: slots over capacity, of which there are none.
        found[number, :3], found[number, 4:] = router.sums, router.counts
    return found
