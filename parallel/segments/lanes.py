"""What the rows of a batch hand on to those of the next batch: memory beyond a row.

A gated delta net goes on with its state and convolution, a layer with a window with the keys and
values that it still sees. Layers without a window begin anew with each row: what they kept would
grow without bound. No gradient goes from one step to another, whose weights are others.
"""

from collections.abc import Sequence

from torch import Tensor


class LaneMemory:
    """Of the rows that this rank has of each batch.

    Attributes:
        earlier: of each row, tokens of the document that it is in the middle of when it begins; 0
            where it begins anew.
        values: [rows, ...], by the names that segments hand them on under.
    """

    def __init__(self, rows: int) -> None:
        self.earlier = [0] * rows
        self.values: dict[str, Tensor] = {}

    def begin(self, continues: Sequence[bool]) -> None:
        """Before a batch, whose rows begin with the rest of the document before, or not."""
        for row, goes_on in enumerate(continues):
            self.earlier[row] *= goes_on

    def keep(self, name: str, rows: slice, value: Tensor) -> None:
        """What some rows hand on; of another shape than before, all rows do."""
        known = self.values.get(name)
        if known is None or known.shape[1:] != value.shape[1:]:
            self.values[name] = value.new_zeros(len(self.earlier), *value.shape[1:])
        self.values[name][rows] = value

    def end(self, lengths: Sequence[Sequence[int]], is_continued: Sequence[bool]) -> None:
        """After a batch.

        Args:
            lengths: of each row's documents, the parts in that row.
            is_continued: whether the row after begins with the rest of the last one.
        """
        for row, (of_row, goes_on) in enumerate(zip(lengths, is_continued, strict=True)):
            before = self.earlier[row] if len(of_row) == 1 else 0
            self.earlier[row] = of_row[-1] + before if goes_on else 0

    def drop(self) -> None:
        """Let all rows begin anew."""
        self.earlier = [0] * len(self.earlier)
