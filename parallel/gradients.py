"""Norms over all ranks, and clipping by that of the gradient, for weights on different meshes."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.fsdp import local_tensor


class Norms(NamedTuple):
    """2-norms, float64, equal on all ranks; the squares of the parts' add up to the whole's.

    Attributes:
        whole: scalar.
        parts: [L + 2], of the embedding, of each layer, and of what comes after them.
    """

    whole: Tensor
    parts: Tensor


def part_of(name: str, n_layers: int) -> int:
    """Where in `Norms.parts` a weight of that name belongs."""
    first, _, rest = name.partition(".")
    if first == "layers":
        return 1 + int(rest.partition(".")[0])
    return 0 if first == "embedding" else n_layers + 1


@torch.no_grad()
def clip_gradients(
    weights: Iterable[tuple[str, nn.Parameter]],
    max_norm: float | None,
    stages: int,
    n_layers: int,
    freed: Tensor | None = None,
) -> Norms:
    """Scale all gradients so that their global 2-norm is at most `max_norm`. Collective.

    Every element of the model counts once, wherever it is stored: each rank adds its part of the
    mean over the copies of a weight. There is one sum over all ranks, so that all get the same
    bits: ranks that scaled their copies of a gradient by other bits would drift apart.

    Args:
        weights: each weight that this rank stores, once, with its name in the model.
        max_norm: of the whole gradient; None leaves it as it is.
        stages: how many groups of ranks, of one size, store different weights (pipeline
            parallelism); within one, a weight is copied to the ranks that it is not sharded over.
        n_layers: of the whole model.
        freed: `UpdatesInBackward.squares`, where gradients are no longer there.

    Returns:
        The norms before clipping.
    """
    named = [(name, weight.grad) for name, weight in weights if weight.grad is not None]
    gradients = [gradient for _, gradient in named]
    parts = [part_of(name, n_layers) for name, _ in named]
    shares = [] if freed is None else [freed]
    if gradients:
        ranks = dist.get_world_size() // stages
        shares.append(add_squares(gradients, parts, n_layers, ranks))
    norms = sum_squares(torch.stack(shares).sum(0))
    if max_norm is not None:
        scale = torch.clamp(max_norm / (norms.whole + 1e-6), max=1.0).float()
        torch._foreach_mul_([local_tensor(gradient) for gradient in gradients], scale)
    return norms


def sum_squares(squares: Tensor) -> Norms:
    """From this rank's shares of the parts' squares [.., L + 2], overwritten. Collective."""
    dist.all_reduce(squares)
    return Norms(squares.sum(-1).sqrt(), squares.sqrt())


class UpdatesInBackward:
    """Has each weight updated once the backward pass has its gradient, which is freed then.

    FSDP's gradients come layer by layer: no more than a layer's exist at a time (as in LOMO, Lv et
    al. 2023, arXiv:2306.09782).

    Args:
        weights: those whose gradient is whole when FSDP has reduced it, with their names.
        update: of one weight, by its `.grad`.
        n_layers: of the whole model.

    Attributes:
        squares: [L + 2], this rank's shares of the parts' squared norms of what was freed since
            `begin`.
    """

    def __init__(
        self,
        weights: Iterable[tuple[str, nn.Parameter]],
        update: Callable[[nn.Parameter], None],
        n_layers: int,
        device: Any,
    ) -> None:
        self.update = update
        self.n_layers = n_layers
        self.squares = torch.zeros(n_layers + 2, dtype=torch.float64, device=device)
        for name, weight in weights:
            hook = partial(self._update_and_free, part_of(name, n_layers))
            weight.register_post_accumulate_grad_hook(hook)

    def begin(self) -> None:
        """Begin a step."""
        self.squares = torch.zeros_like(self.squares)

    @torch.no_grad()
    def _update_and_free(self, part: int, weight: Tensor) -> None:
        assert isinstance(weight, nn.Parameter)
        assert weight.grad is not None
        ranks = dist.get_world_size()
        self.squares += add_squares([weight.grad], [part], self.n_layers, ranks)
        self.update(weight)
        gradient = local_tensor(weight.grad)
        if gradient.is_cuda:
            # FSDP reduces in one stream and may get here in another one.
            gradient.record_stream(torch.cuda.current_stream(gradient.device))
        weight.grad = None


def add_squares(
    tensors: Sequence[Tensor], parts: Sequence[int], n_layers: int, ranks: int
) -> Tensor:
    """This rank's shares of the squared norms of the parts that these tensors belong to.

    Args:
        parts: of each tensor, see `part_of`.
        ranks: that store parts or copies of the same weights.

    Returns:
        [L + 2] float64.
    """
    squares = torch.stack([local_tensor(x).float().square().sum() for x in tensors])
    return add_to_parts(squares, tensors, parts, n_layers, ranks)


def add_to_parts(
    squares: Tensor, tensors: Sequence[Tensor], parts: Sequence[int], n_layers: int, ranks: int
) -> Tensor:
    """From the squared norms [.., N] of what this rank stores of N tensors, as `add_squares`."""
    squares = squares.double()
    # One copy to the device for both.
    share, part = squares.new_tensor([[_shards(x) / ranks for x in tensors], parts])
    is_part = part.unsqueeze(1) == torch.arange(n_layers + 2, device=part.device)
    # A product with zeros would let what is not finite spread to other parts.
    return torch.where(is_part, (squares * share).unsqueeze(-1), 0.0).sum(-2)


def _shards(gradient: Tensor) -> int:
    """How many ranks share out its elements."""
    if not isinstance(gradient, DTensor):
        return 1
    # A dimension that two axes share out has a placement that does not call itself a shard.
    mesh, placements = gradient.device_mesh, gradient.placements
    return prod(mesh.size(axis) for axis, p in enumerate(placements) if not p.is_replicate())
