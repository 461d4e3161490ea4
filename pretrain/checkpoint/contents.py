"""What a checkpoint holds, by names that depend on neither layout nor engine."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pretrain.optim import moments

MODEL, OPTIMIZER, ROUTERS = "model.", "optimizer.", "routers."


def of_weights(weights: nn.Module) -> dict[str, Tensor]:
    """The weights themselves: filling them in place loads them."""
    return {MODEL + name: weight.detach() for name, weight in weights.named_parameters()}


def of_optimizer(weights: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The optimizer's state itself, made if there has been no step yet."""
    return {
        f"{OPTIMIZER}{name}.{moment}": value
        for name, weight in weights.named_parameters()
        for moment, value in moments(optimizer, weight).items()
    }


def of_routers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Args:
        state: of `RouterState.state_dict`.
    """
    return {ROUTERS + name: value for name, value in state.items()}
