"""Which tokens fill the rows of a batch, and their copy: loops over documents."""

from typing import Any

from numpy.typing import NDArray

from data_pipeline.compiled import compiled
from data_pipeline.kernels.columns import (
    ALL_USED_UP,
    BEGUN,
    CHANGE,
    FILLED,
    IS_FULL,
    LIMIT,
    NEEDS_DOCUMENTS,
    NEEDS_ROOM,
    OFFSET,
    OPEN,
    OWED,
    PIECES,
    QUEUED,
    ROWS,
    SHARE,
    SHARES_CHANGE,
    SOURCE_ENDS,
    TOKENS,
    TOTAL,
)

Array = NDArray[Any]


@compiled
def _most_owed(sources: Array) -> int:
    best = -1
    for source in range(len(sources)):
        if sources[source, SHARE] > 0 and (best < 0 or sources[source, OWED] > sources[best, OWED]):
            best = source
    return best


@compiled
def _add_piece(
    pieces: Array,
    row_starts: Array,
    place: Array,
    source: int,
    document: int,
    start: int,
    stop: int,
) -> None:
    """Append a piece, or lengthen the last one of the row if it goes on with it."""
    last = place[PIECES] - 1
    if (
        start > 0
        and last >= row_starts[place[ROWS]]
        and pieces[last, 0] == source
        and pieces[last, 1] == document
        and pieces[last, 3] == start
    ):
        pieces[last, 3] = stop
        return
    pieces[last + 1, 0] = source
    pieces[last + 1, 1] = document
    pieces[last + 1, 2] = start
    pieces[last + 1, 3] = stop
    place[PIECES] += 1


@compiled
def fill_rows(
    documents: Array,
    lengths: Array,
    sources: Array,
    place: Array,
    pieces: Array,
    row_starts: Array,
    seq_len: int,
    scale: int,
) -> tuple[int, int]:
    """Take tokens until all rows are full, or something has to be looked up.

    The next document comes from the source that is owed most. A source is owed SHARE / scale of
    each token that is taken, less those taken from itself; OWED counts in units of 1 / scale.

    Args:
        documents, lengths: [sources, n], those that come next; QUEUED of them, BEGUN already.
        sources, place: [sources, 6] and [7], the columns above; changed.
        pieces: [n, 4], source, document, start, stop; filled.
        row_starts: [rows + 1], filled.

    Returns:
        Why it has stopped, and the source that it is about.
    """
    while place[ROWS] + 1 < len(row_starts):
        if place[TOTAL] == place[CHANGE]:
            return SHARES_CHANGE, -1
        source = place[OPEN]
        if source < 0:
            source = _most_owed(sources)
            if source < 0:
                return ALL_USED_UP, -1
            if sources[source, BEGUN] == sources[source, QUEUED]:
                return NEEDS_DOCUMENTS, source
            place[OPEN], place[OFFSET] = source, 0
            sources[source, BEGUN] += 1
        if place[PIECES] == len(pieces):
            return NEEDS_ROOM, -1
        at = sources[source, BEGUN] - 1
        if lengths[source, at] == 0:
            place[OPEN] = -1
            continue
        start = place[OFFSET]
        taken = min(lengths[source, at] - start, seq_len - place[FILLED])
        taken = min(taken, place[CHANGE] - place[TOTAL])
        _add_piece(pieces, row_starts, place, source, documents[source, at], start, start + taken)
        for other in range(len(sources)):
            sources[other, OWED] += sources[other, SHARE] * taken
        sources[source, OWED] -= scale * taken
        sources[source, TOKENS] += taken
        place[TOTAL] += taken
        place[FILLED] += taken
        if place[FILLED] == seq_len:
            place[ROWS] += 1
            place[FILLED] = 0
            row_starts[place[ROWS]] = place[PIECES]
        place[OFFSET] = start + taken
        if place[OFFSET] == lengths[source, at]:
            place[OPEN], place[OFFSET] = -1, 0
            if sources[source, TOKENS] >= sources[source, LIMIT]:
                return SOURCE_ENDS, source
    return IS_FULL, -1


@compiled
def copy_pieces(
    shard: Array,
    first: Array,
    stop: Array,
    goes_on: Array,
    starts: Array,
    tokens: Array,
    labels: Array,
    position: Array,
    ignored: int,
) -> None:
    """Copy pieces of one shard to where they belong in the rows, laid end to end.

    Args:
        shard: its tokens.
        first, stop: [n], of each piece, in the shard.
        goes_on: [n], whether the token at `stop` is the next one of the document.
        starts: [n], where each piece goes.
        tokens, labels, position: [rows * seq_len] int64, filled there.
        ignored: the label of a document's last token.
    """
    for piece in range(len(first)):
        to = starts[piece]
        size = stop[piece] - first[piece]
        source = shard[first[piece] : stop[piece]]
        for i in range(size):
            tokens[to + i] = source[i]
        for i in range(size - 1):
            labels[to + i] = source[i + 1]
        for i in range(size):
            position[to + i] = i
        labels[to + size - 1] = shard[stop[piece]] if goes_on[piece] else ignored
