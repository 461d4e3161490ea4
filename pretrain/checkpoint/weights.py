"""Whether weights are worth saving."""

import math

import torch
import torch.distributed as dist
from torch import nn

from parallel.fsdp import local_tensor
from pretrain.errors import TrainingError


@torch.no_grad()
def check_weights(weights: nn.Module, limit: float) -> None:
    """Refuse weights that are not finite, or larger than `limit`. Collective.

    Raises:
        TrainingError: on every rank; names the worst weight.
    """
    named = [(name, local_tensor(weight)) for name, weight in weights.named_parameters()]
    named = [(name, part) for name, part in named if part.numel()]
    worst = 0.0, ""
    if named:
        sizes = torch._foreach_norm([part for _, part in named], torch.inf)
        largest = torch.stack([size.double() for size in sizes]).nan_to_num(math.inf, math.inf)
        index = int(largest.argmax())
        worst = float(largest[index]), named[index][0]
    of_all: list[tuple[float, str]] = [worst] * dist.get_world_size()
    dist.all_gather_object(of_all, worst)
    size, name = max(of_all)
    if size > limit:
        what = f"as large as {size:.3g}" if math.isfinite(size) else "not finite"
        raise TrainingError(
            f"elements of {name} are {what} (guard.max_weight = {limit:g}): nothing was saved, and "
            "the checkpoints are from before. A lower optim.lr or more optim.weight_decay may help "
            "(--allow-change); raise guard.max_weight if they are meant to be so large"
        )
