"""The documents of a batch whose rows are shared by the ranks of `cp`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from parallel.layout import RowLayout
from pretrain.model.kernels.documents import Documents


class Rows(NamedTuple):
    """Rows of a batch that are laid out alike."""

    rows: slice
    layout: RowLayout


@dataclass(frozen=True)
class SplitDocuments(Documents):
    """What a rank of `cp` knows of its microbatch: its own tokens, and where all others are.

    Attributes:
        position: [B, T / cp], of this rank's tokens.
        lengths: of the whole rows.
        layouts: of each row.
        rank: this one's number along `cp`.
    """

    layouts: tuple[RowLayout, ...] = ()
    rank: int = 0
    _plans: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of_rank(cls, layouts: Sequence[RowLayout], rank: int) -> "SplitDocuments":
        """This rank's part of rows with these layouts, on the host."""
        positions = []
        for layout in layouts:
            starts = torch.tensor([document.start for document in layout.documents])
            tokens = torch.from_numpy(layout.tokens_of(rank))
            document = torch.searchsorted(starts, tokens, right=True) - 1
            starts[0] -= layout.earlier
            positions.append(tokens - starts[document])
        lengths = tuple(layout.lengths for layout in layouts)
        return cls(torch.stack(positions), lengths, tuple(layouts), rank)

    def joined(self, size: int) -> "SplitDocuments":
        """What groups of `size` consecutive ranks know that hold their tokens together, in the
        order of the row.
        """
        layouts = [layout.joined(size) for layout in self.layouts]
        return SplitDocuments.of_rank(layouts, self.rank // size)

    @property
    def go_on(self) -> bool:
        """Whether some row begins in the middle of a document."""
        return any(layout.earlier for layout in self.layouts)

    def seen(self) -> tuple[list[Rows], int]:
        """The rows with all tokens whose keys are kept, and at which of them their own begin."""
        return self.groups(), 0

    def groups(self) -> list[Rows]:
        """The rows, those with one layout together."""
        if len(set(self.layouts)) == 1:
            return [Rows(slice(0, len(self.layouts)), self.layouts[0])]
        return [Rows(slice(row, row + 1), layout) for row, layout in enumerate(self.layouts)]

    def plan(self, make: Callable[..., Any], *options: Any) -> Any:
        """`make(self, *options)`, made once for all layers and passes."""
        key = (make, *options)
        if key not in self._plans:
            self._plans[key] = make(self, *options)
        return self._plans[key]
