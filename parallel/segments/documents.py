"""The documents of a batch whose rows are cut into segments that come one after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch

from parallel.context.documents import Rows, SplitDocuments
from parallel.layout import AttentionCost, RowLayout, overlap, split_row
from parallel.segments.memory import SegmentMemory


@dataclass(frozen=True)
class SegmentDocuments(SplitDocuments):
    """What a rank of `cp` knows of a segment of its microbatch.

    Attributes:
        position: [B, T / segments / cp], of this rank's tokens in their documents.
        number: of the segment.
        first_seen: the earliest segment with tokens of a document that goes on here.
        rows_seen: of each row, the layout from the start of that segment to the end of this one.
        is_last_seen: whether no document goes on in the next segment of the row.
        hands_on: whether the next segment, or the next row, goes on where this one ends.
        memory: what the segments of the microbatch hand on.
    """

    number: int = 0
    first_seen: int = 0
    rows_seen: tuple[RowLayout, ...] = ()
    is_last_seen: bool = True
    hands_on: bool = False
    memory: SegmentMemory = field(
        default_factory=lambda: SegmentMemory(1), compare=False, repr=False
    )

    def seen(self) -> tuple[list[Rows], int]:
        size = sum(self.layouts[0].lengths)
        groups = replace(self, layouts=self.rows_seen).groups()
        return groups, (self.number - self.first_seen) * size

    def forget_plans(self) -> None:
        """Give back what was made for this pass: kept among tensors that come and go, the small
        ones of all segments would leave holes in the heap.
        """
        self._plans.clear()

    def rows_in_the_middle(self, device: torch.device) -> torch.Tensor:
        """[B] bool: whether the row begins in the middle of a document."""
        earlier = [layout.earlier > 0 for layout in self.layouts]
        return torch.tensor(earlier).to(device, non_blocking=True)


def cut_rows(
    rows: Sequence[Sequence[int]],
    segments: int,
    memory: SegmentMemory,
    rank: int = 0,
    ranks: int = 1,
    cost: AttentionCost | None = None,
) -> list[SegmentDocuments]:
    """The segments of a microbatch, in order, as one of the ranks that share each of them sees it.

    Args:
        rows: lengths of the documents of each row; all add up to one multiple of `segments`. Where
            the memory has lanes, they know in the middle of which documents the rows begin.
        cost: what the ranks share evenly, see `split_row`.
    """
    size = sum(rows[0]) // segments
    documents = [[range(*ends) for ends in pairwise(accumulate(row, initial=0))] for row in rows]
    lanes, before = memory.lanes, [0] * len(rows)
    if lanes is not None:
        before = lanes.earlier[memory.rows]
    layouts = [
        [
            _layout_of(of_row, range(start, start + size), ranks, cost, n_before)
            for start in range(0, size * segments, size)
        ]
        for of_row, n_before in zip(documents, before, strict=True)
    ]
    made: list[SegmentDocuments] = []
    for number in range(segments):
        of_segment = [of_row[number] for of_row in layouts]
        first_seen = min((number * size - layout.earlier) // size for layout in of_segment)
        first_seen = max(0, first_seen)
        rows_seen = tuple(
            _seen(of_row, range(first_seen * size, (number + 1) * size), cut)
            for of_row, cut in zip(documents, layouts, strict=True)
        )
        is_last_seen = number + 1 == segments or not any(
            of_row[number + 1].earlier for of_row in layouts
        )
        whole = SplitDocuments.of_rank(of_segment, rank)
        made.append(
            SegmentDocuments(
                whole.position,
                whole.lengths,
                whole.layouts,
                rank,
                number=number,
                first_seen=first_seen,
                rows_seen=rows_seen,
                is_last_seen=is_last_seen,
                hands_on=not is_last_seen or (lanes is not None and number + 1 == segments),
                memory=memory,
            )
        )
    return made


def cut_apart(lengths: Sequence[int], size: int) -> list[int]:
    """The documents of a row where each segment of `size` tokens begins new ones."""
    ends = {*accumulate(lengths), *range(size, sum(lengths), size)}
    return [end - start for start, end in pairwise([0, *sorted(ends)])]


def tokens_of(segments: Sequence[SegmentDocuments]) -> torch.Tensor:
    """[B, T / cp], the tokens of each row that this rank holds, segment by segment."""
    size, rank = sum(segments[0].lengths[0]), segments[0].rank
    return torch.cat(
        [
            torch.stack([torch.from_numpy(layout.tokens_of(rank)) for layout in segment.layouts])
            + segment.number * size
            for segment in segments
        ],
        dim=1,
    )


def _layout_of(
    documents: Sequence[range],
    segment: range,
    ranks: int,
    cost: AttentionCost | None,
    before: int,
) -> RowLayout:
    """Args: before: tokens of the first document that came before the row."""
    parts = list(_parts(documents, segment))
    document, part = parts[0]
    earlier = part.start - document.start
    # Those before the row cost nothing: only layers that see little of them do at all.
    layout = split_row([len(part) for _, part in parts], ranks, cost, earlier)
    return replace(layout, earlier=earlier + before * (document.start == 0))


def _seen(documents: Sequence[range], tokens: range, layouts: Sequence[RowLayout]) -> RowLayout:
    """The layout of consecutive whole segments as one row."""
    size = sum(layouts[0].lengths)
    numbers = range(tokens.start // size, tokens.stop // size)
    blocks = [
        tuple(
            range(block.start + start, block.stop + start)
            for start, number in zip(range(0, len(tokens), size), numbers, strict=True)
            for block in layouts[number].blocks[rank]
        )
        for rank in range(len(layouts[0].blocks))
    ]
    lengths = tuple(len(part) for _, part in _parts(documents, tokens))
    return RowLayout(lengths, tuple(blocks))


def _parts(documents: Sequence[range], tokens: range) -> Iterator[tuple[range, range]]:
    """The documents that have some of `tokens`, and which."""
    for document in documents:
        if part := overlap(document, tokens):
            yield document, part
