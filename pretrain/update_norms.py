"""The size of the weights, and of the step that has led to them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.fsdp import local_tensor
from parallel.gradients import Norms, add_to_parts, part_of, sum_squares
from pretrain.optim import in_parts


@torch.no_grad()
def weight_and_update_norms(
    weights: nn.Module, optimizer: torch.optim.AdamW, lr: float, n_layers: int, stages: int
) -> Norms:
    """Of all weights, and of the step that has led to them: [2] and [2, L + 2]. Collective.

    Args:
        weights: those of this rank, under their names in the model.
        lr: that the step was taken with.
        n_layers: of the whole model.
        stages: as `parallel.gradients.clip_gradients`.
    """
    named = list(weights.named_parameters())
    group_of = {weight: group for group in optimizer.param_groups for weight in group["params"]}
    squares = [
        torch.stack(_squares(weight, optimizer.state.get(weight, {}), group_of[weight], lr))
        for _, weight in named
    ]
    shares = add_to_parts(
        torch.stack(squares, dim=-1),
        [weight for _, weight in named],
        [part_of(name, n_layers) for name, _ in named],
        n_layers,
        dist.get_world_size() // stages,
    )
    return sum_squares(shares)


def _squares(
    weight: Tensor, state: dict[str, Any], group: dict[str, Any], lr: float
) -> tuple[Tensor, Tensor]:
    """Of what this rank stores of a weight, and of its last update.

    AdamW's state after a step tells what the step was: no copy of the weights is needed. From
    w = (1 - lr decay) before - update, the difference of w and before is
    -(update + lr decay w) / (1 - lr decay).
    """
    mine = local_tensor(weight)
    of_weight, of_update = mine.new_zeros(2).unbind()
    if not state:
        return mine.float().square().sum(), of_update
    (beta_1, beta_2), steps = group["betas"], float(state["step"])
    shrinking = lr * group["weight_decay"]
    size, norm = lr / (1 - beta_1**steps), (1 - beta_2**steps) ** 0.5
    moments = (local_tensor(state[name]) for name in ("exp_avg", "exp_avg_sq"))
    for w, m, v in in_parts(mine, *moments):
        update = m.float() / (v.float().sqrt() / norm).add_(group["eps"])
        update.mul_(size).add_(w, alpha=shrinking)
        of_weight = of_weight + w.square().sum()
        of_update = of_update + update.square_().sum()
    return of_weight, of_update / (1 - shrinking) ** 2
