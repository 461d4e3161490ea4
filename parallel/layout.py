"""Which tokens of a row live on which rank of `cp`: pure index maths.

A row of T tokens is cut into blocks, and every rank gets T / ranks tokens. What a token costs
depends on how far it looks back in its document, so ranks have to share that evenly, too. For a row
of one document this is zigzag: of 2 n blocks, rank r has number r and number 2 n - 1 - r.

With packed documents cost rises and falls along the row. Two kinds of things, tokens and cost, can
be shared evenly among n ranks with 2 (n - 1) cuts, however they are spread: this is the necklace
splitting theorem (Alon 1987, doi:10.1016/0001-8708(87)90055-7). So a rank has two blocks on
average, and zigzag is the special case.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

# A share is first tried at this many places, then at every token near the best.
PLACES = 2_048
# As good as even: fewer blocks matter more.
NEGLIGIBLE_IMBALANCE = 0.005

Blocks = tuple[range, ...]


@dataclass(frozen=True)
class AttentionCost:
    """What a token's place in its document costs: the keys that it sees, summed over layers.

    Attributes:
        full: layers in which a token sees all earlier ones of its document.
        windowed: layers in which it sees `window`.
    """

    full: int = 1
    windowed: int = 0
    window: int = 1

    def of_first(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of that many tokens at the start of a document."""
        inside = np.minimum(tokens, self.window)
        of_window = inside * (inside + 1) // 2 + (tokens - inside) * self.window
        return self.full * tokens * (tokens + 1) // 2 + self.windowed * of_window


@dataclass(frozen=True)
class RowLayout:
    """How ranks share a row.

    Attributes:
        lengths: tokens of the row's documents.
        blocks: of each rank, in the order of the row; a rank holds them one after the other.
        earlier: tokens of the first document that came before the row.
    """

    lengths: tuple[int, ...]
    blocks: tuple[Blocks, ...]
    earlier: int = 0

    @cached_property
    def documents(self) -> list[range]:
        """The documents, as tokens of the row."""
        return [range(*ends) for ends in pairwise(accumulate(self.lengths, initial=0))]

    def parts_of(self, rank: int) -> Iterator[tuple[range, range, int]]:
        """Of each block of a rank the parts by document: the document, the part of it that is in
        the block, and the place where the rank holds that part.
        """
        place = 0
        for block in self.blocks[rank]:
            for document, part in self.parts_of_block(block):
                yield document, part, place
                place += len(part)

    def parts_of_block(self, block: range) -> Iterator[tuple[range, range]]:
        """The parts of consecutive tokens by document: the document, and its part."""
        first = bisect_right(self.documents, block.start, key=lambda document: document.stop)
        for document in self.documents[first:]:
            if document.start >= block.stop:
                return
            yield document, overlap(block, document)

    @cached_property
    def held(self) -> list[tuple[range, int, int]]:
        """Each block, in the order of the row, its rank, and the place where the rank holds it."""
        return sorted(
            (
                (block, rank, place)
                for rank, blocks in enumerate(self.blocks)
                for block, place in zip(
                    blocks, accumulate(map(len, blocks), initial=0), strict=False
                )
            ),
            key=lambda held: held[0].start,
        )

    def holders(self, tokens: range) -> Iterator[tuple[range, int, int]]:
        """Like `held`, of these tokens of the row only."""
        first = bisect_right(self.held, tokens.start, key=lambda held: held[0].start) - 1
        for block, rank, place in self.held[first:]:
            if block.start >= tokens.stop:
                return
            if part := overlap(block, tokens):
                yield part, rank, place + part.start - block.start

    def tokens_of(self, rank: int) -> NDArray[np.int64]:
        """[T / ranks], the tokens of the row that a rank holds, in its order."""
        return np.concatenate([np.arange(b.start, b.stop) for b in self.blocks[rank]])

    def joined(self, size: int) -> "RowLayout":
        """The layout of groups of `size` consecutive ranks that hold their blocks together."""
        groups = (self.blocks[i : i + size] for i in range(0, len(self.blocks), size))
        blocks = tuple(_merged(sum(group, ())) for group in groups)
        return RowLayout(self.lengths, blocks, self.earlier)

    def cut(self, parts: int) -> "RowLayout":
        """The layout where each rank's tokens are cut into equal parts for as many ranks."""
        blocks: list[Blocks] = []
        for of_rank in self.blocks:
            size = sum(map(len, of_rank)) // parts
            starts = range(0, size * parts, size)
            blocks += (_concatenation(of_rank, start, start + size) for start in starts)
        return RowLayout(self.lengths, tuple(blocks), self.earlier)


def split_row(
    lengths: Sequence[int], ranks: int, cost: AttentionCost | None = None, earlier: int = 0
) -> RowLayout:
    """Share a row of packed documents among ranks: equal tokens, and equal cost as nearly as cuts
    between tokens allow. Every rank computes the same.

    Args:
        lengths: of the documents; they add up to a multiple of `ranks`.
        earlier: tokens of the first document that came before the row.
    """
    length, cost = sum(lengths), cost or AttentionCost()
    assert length % ranks == 0
    if ranks == 1:
        return RowLayout(tuple(lengths), ((range(length),),), earlier)
    if len(lengths) == 1 or not (cost.full or cost.windowed):
        return RowLayout(tuple(lengths), zigzag(length, ranks), earlier)
    necklace = _Necklace(lengths, cost, earlier)
    share = length // ranks
    blocks = [necklace.take(share, ranks_left) for ranks_left in range(ranks, 1, -1)]
    # As in zigzag, the last rank has what is taken first.
    return RowLayout(tuple(lengths), (necklace.remaining, *reversed(blocks)), earlier)


def zigzag(length: int, ranks: int) -> tuple[Blocks, ...]:
    """Two blocks of each rank, as far from the row's ends as one another; the last rank's touch."""
    share = length // ranks
    front, back = share // 2, share - share // 2
    return tuple(
        _merged(
            (
                range(rank * front, (rank + 1) * front),
                range(length - (rank + 1) * back, length - rank * back),
            )
        )
        for rank in range(ranks)
    )


def costs(layout: RowLayout, cost: AttentionCost) -> list[int]:
    """What each rank's tokens cost."""
    cumulated = _Cumulated(layout.lengths, cost, layout.earlier)
    return [
        sum(int(cumulated(np.array(b.stop)) - cumulated(np.array(b.start))) for b in blocks)
        for blocks in layout.blocks
    ]


def overlap(a: range, b: range) -> range:
    """The tokens of both."""
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))


class _Cumulated:
    """The cost of all tokens before a place in the row."""

    def __init__(self, lengths: Sequence[int], cost: AttentionCost, earlier: int) -> None:
        sizes = np.array(lengths, np.int64)
        self.cost = cost
        self.starts = np.concatenate([[0], sizes.cumsum()])
        self.earlier = np.zeros(len(sizes) + 1, np.int64)
        self.earlier[0] = earlier
        of_documents = self._of_parts(sizes, self.earlier[:-1])
        self.before = np.concatenate([[0], of_documents.cumsum()])

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        document = np.searchsorted(self.starts, places, side="right") - 1
        inside = self._of_parts(places - self.starts[document], self.earlier[document])
        total: NDArray[np.int64] = self.before[document] + inside
        return total

    def _of_parts(self, tokens: NDArray[np.int64], earlier: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of that many tokens after `earlier` ones of the same document."""
        return self.cost.of_first(earlier + tokens) - self.cost.of_first(earlier)


class _Necklace:
    """What is left of a row, its ends joined, from which ranks cut their shares."""

    def __init__(self, lengths: Sequence[int], cost: AttentionCost, earlier: int) -> None:
        self.cumulated = _Cumulated(lengths, cost, earlier)
        self.remaining: Blocks = (range(sum(lengths)),)

    def take(self, size: int, ranks: int) -> Blocks:
        """Cut out `size` consecutive tokens with 1 / `ranks` of the cost.

        On average over all places, a window has that share of the cost; so somewhere it has.
        """
        ends = np.array([0, *accumulate(map(len, self.remaining))])
        starts = np.array([block.start for block in self.remaining])
        of_block = self.cumulated(starts)
        before = np.cumsum(
            [0, *(self.cumulated(np.array([b.stop for b in self.remaining])) - of_block)]
        )

        def cost_up_to(places: NDArray[np.int64]) -> NDArray[np.int64]:
            """Of the first tokens on the necklace, going round."""
            rounds, places = np.divmod(places, ends[-1])
            block = np.searchsorted(ends, places, side="right") - 1
            inside = self.cumulated(starts[block] + places - ends[block]) - of_block[block]
            return rounds * before[-1] + before[block] + inside

        def imbalance(places: NDArray[np.int64]) -> NDArray[np.float64]:
            cost = cost_up_to(places + size) - cost_up_to(places)
            return np.abs(cost * ranks / max(1, before[-1]) - 1)

        step = max(1, ends[-1] // PLACES)
        places = np.arange(0, ends[-1], step)
        blocks = np.searchsorted(ends, (places + size - 1) % ends[-1], side="right")
        blocks = (blocks - np.searchsorted(ends, places, side="right")) % len(starts)
        found = imbalance(places)
        # Of places that are even enough, one that cuts few blocks.
        rank = np.where(found <= NEGLIGIBLE_IMBALANCE, blocks - len(starts) - 1.0, found)
        best = places[np.argmin(rank)]
        near = np.arange(best - step + 1, best + step) % ends[-1]
        return self._cut(int(near[np.argmin(imbalance(near))]), size)

    def _cut(self, start: int, size: int) -> Blocks:
        length = sum(map(len, self.remaining))
        over = max(0, start + size - length)
        taken = (
            *_concatenation(self.remaining, 0, over),
            *_concatenation(self.remaining, start, start + size - over),
        )
        self.remaining = _merged(
            (
                *_concatenation(self.remaining, over, start),
                *_concatenation(self.remaining, start + size - over, length),
            )
        )
        return _merged(taken)


def _concatenation(blocks: Sequence[range], start: int, stop: int) -> Blocks:
    """The tokens [start, stop) of what the blocks are one after the other."""
    parts = []
    for block, first in zip(blocks, accumulate(map(len, blocks), initial=0), strict=False):
        part = block[max(0, start - first) : max(0, stop - first)]
        if part:
            parts.append(part)
    return tuple(parts)


def _merged(blocks: Sequence[range]) -> Blocks:
    """The blocks in order, those that touch as one."""
    merged: list[range] = []
    for block in sorted((block for block in blocks if block), key=lambda block: block.start):
        if merged and merged[-1].stop == block.start:
            merged[-1] = range(merged[-1].start, block.stop)
        else:
            merged.append(block)
    return tuple(merged)
