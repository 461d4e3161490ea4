"""The global gradient norm, and clipping by it, over weights on different meshes."""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, pipeline: dist.ProcessGroup
) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most `max_norm`. Collective.

    Every element of the model counts once, wherever it is stored: squares are added over the
    mesh axes a weight is sharded on, and not over those it is replicated on.

    Args:
        parameters: each weight that this rank stores, once.
        max_norm: of the whole gradient.
        pipeline: the ranks that have the other layers.

    Returns:
        The norm before clipping: float64 scalar, equal on all ranks.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    groups: dict[tuple[object, ...], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        groups[_axes(gradient)].append(gradient)

    total = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    for members in groups.values():
        squares = torch.stack([_local(g).float().square().sum().double() for g in members]).sum()
        for group in _sharding_groups(members[0]):
            dist.all_reduce(squares, group=group)
        total += squares
    if dist.get_world_size(pipeline) > 1:
        dist.all_reduce(total, group=pipeline)
    norm = total.sqrt()

    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0).float()
    for gradient in gradients:
        _local(gradient).mul_(scale)
    return norm


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _axes(gradient: Tensor) -> tuple[object, ...]:
    if not isinstance(gradient, DTensor):
        return ()
    return (gradient.device_mesh, *gradient.placements)


def _sharding_groups(gradient: Tensor) -> list[dist.ProcessGroup]:
    if not isinstance(gradient, DTensor):
        return []
    # A dimension that two axes share out has a placement that does not call itself a shard.
    return [
        gradient.device_mesh.get_group(axis)
        for axis, placement in enumerate(gradient.placements)
        if not placement.is_replicate()
    ]
