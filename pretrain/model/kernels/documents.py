"""Which tokens of a packed batch belong to the same document."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Document boundaries of a batch of B rows of T tokens.

    A document never crosses a row: every row starts one. No layer may let information pass from
    one document to another.

    Attributes:
        position: [B, T] int64, the token's distance from the start of its document.
        lengths: tokens of each document of each row, known to the host without asking a device.
    """

    position: Tensor
    lengths: tuple[tuple[int, ...], ...]

    @classmethod
    def from_position(cls, position: Tensor) -> "Documents":
        """From the positions [B, T] alone; a document starts wherever the position is 0.

        The host waits for a `position` that is on a GPU.
        """
        length = position.shape[1]
        starts = [row.nonzero().flatten().tolist() for row in (position == 0).cpu()]
        lengths = ((b - a for a, b in pairwise([*row, length])) for row in starts)
        return cls(position, tuple(map(tuple, lengths)))

    @classmethod
    def from_lengths(
        cls, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> "Documents":
        """From the document lengths of each row; all rows must add up to the same T."""
        position = [torch.cat([torch.arange(n) for n in lengths]) for lengths in rows]
        return cls(torch.stack(position).to(device), tuple(map(tuple, rows)))

    @classmethod
    def whole_rows(cls, batch: int, length: int, device: torch.device | str = "cpu") -> "Documents":
        """One document per row."""
        position = torch.arange(length, device=device).expand(batch, length)
        return cls(position, ((length,),) * batch)

    def to(self, device: torch.device) -> Self:
        """The same on a device; the host does not wait."""
        return replace(self, position=self.position.to(device, non_blocking=True))

    @property
    def is_packed(self) -> bool:
        """Whether some row holds more than one document."""
        return any(len(row) > 1 for row in self.lengths)
