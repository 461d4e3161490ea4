"""A consecutive part of the model on this rank, with the part of the loss that is its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.model.kernels.documents import Documents


@dataclass(frozen=True)
class Objective:
    """What a model is trained for, as functions of its parts' outputs.

    Attributes:
        cross_entropy: `(hidden [b, T, d], weight [V, d], labels [b, T]) -> sum` over the tokens;
            `shard` tells which rows of the vocabulary `weight` has.
        auxiliary_loss: a part's output -> what its layers add to the loss of a global batch.
        measure: a part's output -> float64 vector of what its layers measured.
    """

    cross_entropy: Callable[..., Tensor]
    auxiliary_loss: Callable[[Any], Tensor]
    measure: Callable[[Any], Tensor]


class Stage(nn.Module):
    """A part of a `Transformer` that a pipeline calls; without a pipeline, the whole.

    Attributes:
        model: a `Transformer`, perhaps without embedding, head or some layers.
        loss_tokens: of the global batch; the cross-entropy is divided by it.
        documents: of the microbatches to come, in order; with segments, those of each.
        cross_entropy: the sum over what this stage saw since `begin`, float64 scalar.
        measured: the sum of `Objective.measure` since `begin`.
    """

    def __init__(self, model: Any, objective: Objective, index: int) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.index = index
        self.is_first: bool = model.part.embeds
        self.is_last: bool = model.part.predicts
        self.begin(1, [])

    def begin(self, loss_tokens: int, documents: Sequence[Any]) -> None:
        """Start a global batch. Every schedule runs its microbatches forward in their order."""
        self.loss_tokens = loss_tokens
        self.documents = iter(documents)
        self.cross_entropy: Tensor | float = 0.0
        self.measured: Tensor | float = 0.0

    def forward(
        self, x: Tensor, labels: Tensor | None, documents: Documents | None = None
    ) -> Tensor:
        """Run one microbatch.

        The auxiliary loss of these layers rides on what is returned: it reaches the weights when
        that is differentiated, in whatever order a schedule does so.

        Args:
            x: tokens [b, T] on the first stage, else hidden state [b, T_local, d].
            labels: [b, T]; None, to run the layers for nothing but what they keep.
            documents: of these tokens; by default the next of those that `begin` was given.

        Returns:
            Hidden state [b, T_local, d]; on the last stage the mean cross-entropy's share of this
            microbatch, float32 scalar; without labels nothing of meaning.
        """

        def output(hidden: Tensor, weight: Tensor) -> Tensor:
            return self.objective.cross_entropy(hidden, weight, labels)

        if documents is None:
            documents = next(self.documents)
        if labels is None:
            nothing: Tensor = self.model(x, documents, _no_output).value
            return nothing
        out = self.model(x, documents, output)
        self.measured = self.measured + self.objective.measure(out)
        value: Tensor = out.value
        if self.is_last:
            self.cross_entropy = self.cross_entropy + value.detach().double()
            value = value / self.loss_tokens
        result: Tensor = _AttachLoss.apply(value, self.objective.auxiliary_loss(out))
        return result


def _no_output(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.new_zeros(())


class _AttachLoss(torch.autograd.Function):
    """`x`, whose backward also differentiates `loss`, once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad[0], torch.ones_like(loss)
