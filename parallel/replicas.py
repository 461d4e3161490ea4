"""Weights that several ranks hold copies of, each with a part of the gradient."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.fsdp import local_tensor


@dataclass(frozen=True)
class TiedCopy:
    """The embedding at the end of a pipeline that also has it at the start.

    Attributes:
        original: the embedding, where this rank holds the first stage.
        copy: the output embedding, where this rank holds the last stage. No optimizer sees it.
        ends: the ranks that hold the two; None where one rank holds both.
    """

    original: nn.Parameter | None
    copy: nn.Parameter | None
    ends: dist.ProcessGroup | None

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Add the copy's gradient to the original's."""
        weight = self.original if self.original is not None else self.copy
        if weight is None:
            return
        if self.ends is not None:
            dist.all_reduce(_gradient(weight), group=self.ends)
        elif self.original is not None and self.copy is not None:
            _gradient(self.original).add_(_gradient(self.copy))
        if self.copy is not None:
            self.copy.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the copy the value of the original."""
        weight = self.original if self.original is not None else self.copy
        if weight is None:
            return
        if self.ends is not None:
            dist.broadcast(local_tensor(weight), group=self.ends, group_src=0)
        elif self.original is not None and self.copy is not None:
            local_tensor(self.copy).copy_(local_tensor(self.original))


@dataclass(frozen=True)
class Replicas:
    """What has to be done between the last backward pass of a step and the next step.

    Attributes:
        tp: the ranks that share each layer; None without tensor parallelism.
        whole: weights that they do not share out: each rank has the gradient of its own tokens
            or heads; by name.
        tied: the copies of a tied embedding.
    """

    tp: dist.ProcessGroup | None = None
    whole: Mapping[str, nn.Parameter] = field(default_factory=dict)
    tied: TiedCopy = field(default_factory=lambda: TiedCopy(None, None, None))

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Complete the gradients of all copies: one collective for each group."""
        if self.tp is not None and self.whole:
            gradients = [_gradient(weight) for weight in self.whole.values()]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat, group=self.tp)
            sizes = [gradient.numel() for gradient in gradients]
            for gradient, total in zip(gradients, flat.split(sizes), strict=True):
                gradient.copy_(total.view_as(gradient))
        self.tied.sum_gradients()

    def copies(self) -> Iterator[tuple[str, Tensor, dist.ProcessGroup]]:
        """Name, local tensor and holders of each weight that has to be equal on several ranks."""
        if self.tp is not None:
            for name, weight in self.whole.items():
                yield name, local_tensor(weight), self.tp
        tied = self.tied.original if self.tied.original is not None else self.tied.copy
        if tied is not None and self.tied.ends is not None:
            yield "embedding.weight", local_tensor(tied), self.tied.ends

    def refresh(self) -> None:
        """Bring copies that the optimizer does not update up to date."""
        self.tied.refresh()


def _gradient(weight: nn.Parameter) -> Tensor:
    assert weight.grad is not None
    return local_tensor(weight.grad)
