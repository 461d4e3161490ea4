"""farspan's router in megatron-core's layer of experts."""

from typing import Any

import torch
import torch.distributed as dist
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

    Attributes:
        counts: [E] int64, slots of each expert on this rank since the step began.
        previous: [E] int64, those of all ranks in the step before; whole numbers, which stay
            exact where a model's floats become bf16.
        loss_share: what a token's balance weighs, as `finalize_model_grads` divides the sum over
            tokens and layers by the number of loss tokens alone.
    """

    counts: Tensor
    previous: Tensor

    def __init__(
        self,
        moe: MoEConfig,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.moe = moe
        device = torch.cuda.current_device()
        for name, start in (("counts", torch.zeros), ("previous", torch.ones)):
            each = start(moe.n_experts, dtype=torch.int64, device=device)
            self.register_buffer(name, each, persistent=False)
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
        frequencies = self.previous / self.previous.sum()
        balance = self.moe.n_experts * (frequencies * probability.sum(0)).sum()
        z = logits.logsumexp(-1).square().sum()
        return (self.moe.aux_loss * balance + self.moe.z_loss * z) * self.loss_share


def routers_of(models: list[Any]) -> list[Router]:
    """Those of this rank's layers, in order."""
    return [module for model in models for module in model.modules() if isinstance(module, Router)]


def begin_step(routers: list[Router], loss_tokens: int, tokens: int) -> None:
    """Let losses be means over the `tokens` of a global batch, `loss_tokens` of them with a loss.

    Call it before the forward pass.
    """
    for router in routers:
        router.loss_share = loss_tokens / (tokens * router.config.num_layers)


def finish_step(routers: list[Router]) -> None:
    """Learn from the step, over all ranks. Collective."""
    for router in routers:
        # Ranks of tp have parts of the sequence.
        dist.all_reduce(router.counts, group=router.tp_dp_cp_group)
        router.previous.copy_(router.counts)
        router.counts.zero_()
