"""The loss of each token of a batch, and what it is by source and by position."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.model.kernels.cross_entropy import (
    IGNORED,
    VocabularyShard,
    chunked_cross_entropy,
)


class TokenLosses:
    """The cross-entropy of an `Objective`, which keeps what each token of a training step adds.

    Args:
        chunk: tokens whose logits exist at a time.

    Attributes:
        seen: [b, T] of each call since `begin` that a gradient is taken of, float32 or wider.
    """

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self.begin()

    def begin(self) -> None:
        """Forget all."""
        self.seen: list[Tensor] = []

    def __call__(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabularyShard | None = None
    ) -> Tensor:
        losses = None
        if torch.is_grad_enabled():
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            losses = torch.empty(labels.shape, dtype=dtype, device=labels.device)
            self.seen.append(losses)
        return chunked_cross_entropy(hidden, weight, labels, self.chunk, shard, losses)


class LossPart(NamedTuple):
    """The loss over some of a batch's tokens.

    Attributes:
        loss: mean cross-entropy in nats; NaN without a token.
        tokens: that it is the mean over.
    """

    loss: float
    tokens: int


class LossGroups:
    """Groups of tokens by their source, and by how many tokens each is predicted from.

    The buckets of the latter are those of `pretrain.evals.by_position`: number n has the tokens
    predicted from 2^n to 2^(n + 1) - 1 others.

    Args:
        sources: how many there are.
        longest: the most tokens that one can be predicted from.
    """

    def __init__(self, sources: int, longest: int) -> None:
        self._shape = sources, longest.bit_length()

    @property
    def size(self) -> int:
        """Numbers that `add_up` returns."""
        sources, buckets = self._shape
        return 2 * sources * buckets

    def of_tokens(self, source: Tensor, position: Tensor) -> Tensor:
        """The group of each token, int32 of any shape.

        Args:
            source: the number of its source.
            position: how many tokens of its document come before it.
        """
        # The first token of a document is one that the second is predicted from.
        bucket = torch.frexp((position + 1).double()).exponent - 1
        return source.int() * self._shape[1] + bucket

    def add_up(self, losses: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
        """The sum of the losses of each group, and the number of its labels, float64.

        All arguments have one shape. What the ranks add up is what `split` takes.
        """
        found = torch.stack([losses.double(), (labels != IGNORED).double()]).flatten(1)
        sums = found.new_zeros(2, self.size // 2).index_add_(1, groups.flatten(), found)
        return sums.flatten()

    def split(self, sums: Tensor) -> tuple[list[LossPart], list[LossPart]]:
        """The loss of each source, and of each bucket of positions."""
        loss, tokens = sums.view(2, *self._shape).unbind()
        by_source = zip(loss.sum(1).tolist(), tokens.sum(1).tolist(), strict=True)
        by_position = zip(loss.sum(0).tolist(), tokens.sum(0).tolist(), strict=True)
        return _means(list(by_source)), _means(list(by_position))


def _means(sums: Sequence[tuple[float, float]]) -> list[LossPart]:
    return [
        LossPart(loss / tokens if round(tokens) else float("nan"), round(tokens))
        for loss, tokens in sums
    ]
