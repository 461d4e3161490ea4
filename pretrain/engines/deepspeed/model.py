"""Our model, its loss and its optimizer, as DeepSpeed takes them."""

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from pretrain.config import Config, OptimConfig
from pretrain.engines.deepspeed.state import whole_shape
from pretrain.model.kernels.documents import Documents
from pretrain.model.transformer import Transformer
from pretrain.objective import build_objective, measure_routers


class Loss(nn.Module):
    """What DeepSpeed calls: a microbatch's share of the loss of a global batch.

    Args:
        cross_entropy: of an `Objective`.
    """

    def __init__(self, config: Config, cross_entropy: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = Transformer(config.model)
        self.objective = build_objective(config, cross_entropy)

    def forward(
        self, tokens: Tensor, labels: Tensor, documents: Documents, loss_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """tokens and labels [b, T] -> the loss to differentiate, and what `measure_routers` says.

        Args:
            loss_tokens: of the whole global batch.
        """

        def output(hidden: Tensor, weight: Tensor) -> Tensor:
            return self.objective.cross_entropy(hidden, weight, labels)

        out = self.model(tokens, documents, output)
        loss = out.value / loss_tokens + self.objective.auxiliary_loss(out)
        return loss, measure_routers(out)


def build_loss(
    config: Config,
    cross_entropy: Callable[..., Tensor],
    theirs: dict[str, Any],
    device: torch.device,
) -> Loss:
    """A model with weights that mean nothing; with ZeRO 3 no rank ever has all of them.

    Args:
        theirs: what `deepspeed.initialize` takes.
    """
    if config.parallel.zero.stage < 3:
        return Loss(config, cross_entropy).to(device)
    with deepspeed.zero.Init(config_dict_or_path=theirs):
        return Loss(config, cross_entropy)


def build_optimizer(loss: Loss, config: OptimConfig) -> torch.optim.AdamW:
    """That of `pretrain.optim`, which cannot tell matrices by what ZeRO 3 leaves of them."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for weight in loss.parameters():
        groups[len(whole_shape(weight)) >= 2].append(weight)
    decay = {True: config.weight_decay, False: 0.0}
    return torch.optim.AdamW(
        [{"params": weights, "weight_decay": decay[kind]} for kind, weights in groups.items()],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )
