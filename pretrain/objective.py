"""What a step of training minimises and measures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from parallel.stage import Objective
from pretrain.balancing import auxiliary_loss
from pretrain.config import Config
from pretrain.model.kernels.cross_entropy import chunked_cross_entropy
from pretrain.model.transformer import TransformerOutput
from pretrain.token_losses import LossPart


@dataclass(frozen=True)
class Measured:
    """What a global batch measured, equal on all ranks.

    Attributes:
        loss: mean cross-entropy in nats.
        aux_loss: balance loss, the mean over layers; 1 where all experts get the same.
        z_loss: the router's z-loss, the mean over tokens and layers.
        router_entropy: of the experts' probabilities in nats, the mean over tokens and layers.
        loss_tokens: that the loss is the mean over.
        by_source: the loss of each source of the mixture.
        by_position: the loss by how many tokens one was predicted from, see `LossGroups`.
        data_wait_s: seconds that ranks waited for the batch, the mean over them.
        exposed_communication_s: seconds that collectives kept ranks from computing, the mean.
        pipeline_bubble: share of the forward and backward passes in which ranks computed no stage,
            the mean over them; 1 without a pipeline.
        expert_counts: [layers, E], slots of each expert.
        dropped: [layers], slots over capacity.
        stop_requested: whether any rank was asked to stop.
        is_written: whether all ranks have written their part of the checkpoint that was begun last.
    """

    loss: float
    aux_loss: float
    z_loss: float
    router_entropy: float
    loss_tokens: int
    by_source: Sequence[LossPart]
    by_position: Sequence[LossPart]
    data_wait_s: float
    exposed_communication_s: float
    pipeline_bubble: float
    expert_counts: Tensor
    dropped: Tensor
    stop_requested: bool
    is_written: bool


def build_objective(
    config: Config, cross_entropy: Callable[..., Tensor] | None = None
) -> Objective:
    """Cross-entropy, plus what the routers of each layer add.

    Args:
        cross_entropy: one that keeps more than the sum, as `TokenLosses`.
    """
    model = config.model
    tokens = tokens_per_step(config)

    def of_routers(out: TransformerOutput) -> Tensor:
        return auxiliary_loss(out.balance, out.z, tokens, model.n_layers, model.moe)

    summed = cross_entropy or partial(chunked_cross_entropy, chunk=config.train.loss_chunk)
    return Objective(summed, of_routers, measure_routers)


def tokens_per_step(config: Config) -> int:
    return config.train.global_batch * config.data.seq_len


def measure_routers(out: TransformerOutput) -> Tensor:
    """Of each layer with experts: balance, z, entropy, dropped slots, expert counts; float64
    [L, 4 + E].
    """
    of_tokens = [out.balance.detach(), out.z.detach(), out.entropy, out.dropped.to(out.z.dtype)]
    columns = torch.stack(of_tokens, 1)
    return torch.cat([columns.double(), out.expert_counts.double()], 1)
