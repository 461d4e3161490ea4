"""What ranks add up of a step, and what it comes to."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config import Config
from pretrain.engines.engine import Measured
from pretrain.objective import tokens_per_step
from pretrain.token_losses import LossGroups


def sum_over_ranks(*parts: Tensor) -> list[Tensor]:
    """The sums over all ranks of vectors of float64, on the host, by one collective."""
    total = torch.cat(parts)
    dist.all_reduce(total)
    return list(total.cpu().split([len(part) for part in parts]))


def measured_by(
    config: Config, groups: LossGroups, summed: Sequence[Tensor], loss_tokens: int
) -> Measured:
    """What every engine measures.

    Args:
        summed: over all ranks: the losses of all tokens, and what `groups.add_up` gave [1 +
            groups.size]; of all layers, as `measure_routers`, in one row; and the numbers that
            `Engine.backward` was given.
        loss_tokens: of the global batch.
    """
    losses, of_routers, numbers = summed
    by_source, by_position = groups.split(losses[1:])
    of_layers = of_routers.view(-1, 4 + config.model.moe.n_experts)
    places = max(1, tokens_per_step(config) * config.model.n_layers)
    balance, z, entropy = (of_layers[:, :3].sum(0) / places).tolist()
    return Measured(
        loss=float(losses[0]) / loss_tokens,
        loss_tokens=loss_tokens,
        by_source=by_source,
        by_position=by_position,
        expert_counts=of_layers[:, 4:],
        dropped=of_layers[:, 3],
        numbers=numbers.tolist(),
        aux_loss=balance,
        z_loss=z,
        router_entropy=entropy,
    )
