"""Whether weights are worth saving."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.errors import TrainingError


@torch.no_grad()
def check_weights(weights: Iterable[tuple[str, Tensor]], limit: float) -> None:
    """Refuse weights that are not finite, or larger than `limit`. Collective.

    Args:
        weights: what this rank stores of each.

    Raises:
        TrainingError: on every rank; names the worst weight.
    """
    named = [(name, part) for name, part in weights if part.numel()]
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
