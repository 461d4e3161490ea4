"""Which tokens of a packed batch belong to the same document."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Document boundaries of a batch of B rows of T tokens.

    A document never crosses a row: every row starts one. No layer may let information pass from
    one document to another.

    Attributes:
        position: [B, T] int64, the token's distance from the start of its document.
        cu_seqlens: [n + 1] int64, the starts of the n documents in the flattened [B * T] batch,
            and B * T at the end (the convention of flash-attn's variable-length functions).
    """

    position: Tensor
    cu_seqlens: Tensor

    @classmethod
    def from_position(cls, position: Tensor) -> "Documents":
        """From the positions [B, T] alone; a document starts wherever the position is 0."""
        starts = (position.flatten() == 0).nonzero().flatten()
        end = torch.tensor([position.numel()], device=position.device)
        return cls(position, torch.cat([starts, end]))

    @classmethod
    def from_lengths(
        cls, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> "Documents":
        """From the document lengths of each row; all rows must add up to the same T."""
        position = [torch.cat([torch.arange(n) for n in lengths]) for lengths in rows]
        return cls.from_position(torch.stack(position).to(device))

    @classmethod
    def whole_rows(cls, batch: int, length: int, device: torch.device | str = "cpu") -> "Documents":
        """One document per row."""
        position = torch.arange(length, device=device).expand(batch, length)
        return cls(position, torch.arange(0, batch * length + 1, length, device=device))

    @property
    def is_packed(self) -> bool:
        """Whether some row holds more than one document."""
        return self.cu_seqlens.numel() - 1 > self.position.shape[0]

    @property
    def ids(self) -> Tensor:
        """[B, T] int64: the number of the token's document within the batch."""
        return (self.position.flatten() == 0).cumsum(0).view_as(self.position) - 1
