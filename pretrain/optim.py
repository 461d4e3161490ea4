"""The optimizer."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pretrain.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101); only matrices decay.

    Weights on different meshes stand in different groups, because one fused update cannot span
    two meshes.
    """
    groups: dict[tuple[object, ...], list[nn.Parameter]] = defaultdict(list)
    for weight in model.parameters():
        mesh = weight.device_mesh if isinstance(weight, DTensor) else None
        groups[mesh, weight.ndim >= 2].append(weight)
    return torch.optim.AdamW(
        [
            {"params": weights, "weight_decay": config.weight_decay if decays else 0.0}
            for (_, decays), weights in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )


def moments(optimizer: torch.optim.AdamW, weight: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's state of one weight, made if there has been no step yet."""
    state: dict[str, Tensor] = optimizer.state[weight]
    if not state:
        state["step"] = torch.zeros(())
        state["exp_avg"] = torch.zeros_like(weight)
        state["exp_avg_sq"] = torch.zeros_like(weight)
    return state


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` for the next step."""
    for group in optimizer.param_groups:
        settings: dict[str, Any] = group
        settings["lr"] = lr
