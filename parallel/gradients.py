"""The global gradient norm, and clipping by it, over weights on different meshes."""

from collections.abc import Iterable
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.fsdp import local_tensor


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, stages: int) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most `max_norm`. Collective.

    Every element of the model counts once, wherever it is stored: each rank adds its part of the
    mean over the copies of a weight. There is one sum over all ranks, so that all get the same
    bits: ranks that scaled their copies of a gradient by other bits would drift apart.

    Args:
        parameters: each weight that this rank stores, once.
        max_norm: of the whole gradient.
        stages: how many groups of ranks, of one size, store different weights (pipeline
            parallelism); within one, a weight is copied to the ranks that it is not sharded over.

    Returns:
        The norm before clipping: float64 scalar, equal on all ranks.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    owned = [local_tensor(gradient) for gradient in gradients]
    ranks = dist.get_world_size() // stages
    squares = torch.stack([x.float().square().sum() for x in owned]).double()
    weight_of = squares.new_tensor([_shards(gradient) / ranks for gradient in gradients])
    total = squares @ weight_of
    dist.all_reduce(total)
    norm = total.sqrt()

    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0).float()
    torch._foreach_mul_(owned, scale)
    return norm


def _shards(gradient: Tensor) -> int:
    """How many ranks share out its elements."""
    if not isinstance(gradient, DTensor):
        return 1
    # A dimension that two axes share out has a placement that does not call itself a shard.
    mesh, placements = gradient.device_mesh, gradient.placements
    return prod(mesh.size(axis) for axis, p in enumerate(placements) if not p.is_replicate())
