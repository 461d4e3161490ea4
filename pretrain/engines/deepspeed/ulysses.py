"""DeepSpeed's Ulysses (Jacobs et al. 2023, arXiv:2309.14509) around our softmax attention."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor

from pretrain.model.kernels.attention import documents_attention
from pretrain.model.kernels.documents import Documents


@dataclass(frozen=True)
class ConsecutiveDocuments(Documents):
    """What a rank knows that has consecutive tokens of each row, as Ulysses wants them.

    Attributes:
        position: [B, T / ranks], of this rank's tokens.
        whole: of the whole rows.
    """

    whole: Documents

    @classmethod
    def of_rank(cls, whole: Documents, rank: int, ranks: int) -> "ConsecutiveDocuments":
        """The part of rank number `rank`."""
        return cls(whole.position.chunk(ranks, 1)[rank], whole.lengths, whole)

    def to(self, device: torch.device) -> Self:
        """The same on a device; the host does not wait."""
        position = self.position.to(device, non_blocking=True)
        return replace(self, position=position, whole=self.whole.to(device))


class UlyssesAttention:
    """Takes the place of `attention.core`.

    Args:
        group: ranks with consecutive parts of the rows, which exchange heads for tokens.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._exchange = DistributedAttention(_of_some_heads, group, scatter_idx=2, gather_idx=1)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: ConsecutiveDocuments,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """q [B, H, t, D], k and v [B, Hkv, t, D], of this rank's tokens -> [B, H, t, D]."""
        heads_third = (x.transpose(1, 2) for x in (q, k, v))
        # The first dimension is that of the batch, and our layers have rotated already.
        out: Tensor = self._exchange(*heads_third, 0, None, documents.whole, scale, window)
        return out.transpose(1, 2)


def exchange_heads(layers: Iterable[Any], group: dist.ProcessGroup) -> None:
    """Let `Layer` modules compute on this rank's consecutive part of each row."""
    attention = UlyssesAttention(group)
    for layer in layers:
        layer.attention.core = attention


def _of_some_heads(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None
) -> Tensor:
    """All tokens of some heads: [B, T, heads, D] each -> [B, T, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return documents_attention(q, k, v, documents, scale=scale, window=window).transpose(1, 2)
