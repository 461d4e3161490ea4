"""What a step of training minimises, and measures of its routers."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from parallel.stage import Objective
from pretrain.balancing import auxiliary_loss
from pretrain.config import Config
from pretrain.model.kernels.cross_entropy import chunked_cross_entropy
from pretrain.model.transformer import TransformerOutput


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
