"""The global gradient norm, and clipping by it, over weights on different meshes."""

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.fsdp import local_tensor


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter],
    max_norm: float | None,
    stages: int,
    freed: Tensor | None = None,
) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most `max_norm`. Collective.

    Every element of the model counts once, wherever it is stored: each rank adds its part of the
    mean over the copies of a weight. There is one sum over all ranks, so that all get the same
    bits: ranks that scaled their copies of a gradient by other bits would drift apart.

    Args:
        parameters: each weight that this rank stores, once.
        max_norm: of the whole gradient; None leaves it as it is.
        stages: how many groups of ranks, of one size, store different weights (pipeline
            parallelism); within one, a weight is copied to the ranks that it is not sharded over.
        freed: `UpdatesInBackward.squares`, where gradients are no longer there.

    Returns:
        The norm before clipping: float64 scalar, equal on all ranks.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    ranks = dist.get_world_size() // stages
    shares = [] if freed is None else [freed]
    if gradients:
        shares.append(_squares(gradients, ranks))
    total = torch.stack(shares).sum()
    dist.all_reduce(total)
    norm = total.sqrt()
    if max_norm is not None:
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0).float()
        torch._foreach_mul_([local_tensor(gradient) for gradient in gradients], scale)
    return norm


class UpdatesInBackward:
    """Has each weight updated once the backward pass has its gradient, which is freed then.

    FSDP's gradients come layer by layer: no more than a layer's exist at a time (as in LOMO, Lv et
    al. 2023, arXiv:2306.09782).

    Args:
        weights: those whose gradient is whole when FSDP has reduced it.
        update: of one weight, by its `.grad`.

    Attributes:
        squares: this rank's share of the squared norm of what was freed since `begin`.
    """

    def __init__(
        self, weights: Iterable[nn.Parameter], update: Callable[[nn.Parameter], None], device: Any
    ) -> None:
        self.update = update
        self.squares = torch.zeros((), dtype=torch.float64, device=device)
        for weight in weights:
            weight.register_post_accumulate_grad_hook(self._update_and_free)

    def begin(self) -> None:
        """Begin a step."""
        self.squares = torch.zeros_like(self.squares)

    @torch.no_grad()
    def _update_and_free(self, weight: Tensor) -> None:
        assert isinstance(weight, nn.Parameter)
        assert weight.grad is not None
        self.squares += _squares([weight.grad], dist.get_world_size())
        self.update(weight)
        gradient = local_tensor(weight.grad)
        if gradient.is_cuda:
            # FSDP reduces in one stream and may get here in another one.
            gradient.record_stream(torch.cuda.current_stream(gradient.device))
        weight.grad = None


def _squares(gradients: Sequence[Tensor], ranks: int) -> Tensor:
    """This rank's share of the squared norm of these gradients, float64 scalar.

    Args:
        ranks: that store parts or copies of the same weights.
    """
    squares = torch.stack([local_tensor(x).float().square().sum() for x in gradients]).double()
    return squares @ squares.new_tensor([_shards(gradient) / ranks for gradient in gradients])


def _shards(gradient: Tensor) -> int:
    """How many ranks share out its elements."""
    if not isinstance(gradient, DTensor):
        return 1
    # A dimension that two axes share out has a placement that does not call itself a shard.
    mesh, placements = gradient.device_mesh, gradient.placements
    return prod(mesh.size(axis) for axis, p in enumerate(placements) if not p.is_replicate())
