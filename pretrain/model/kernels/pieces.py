"""Causal and sliding-window attention as rectangles and triangles of queries and keys.

A query i sees the keys j of its document with i - window < j <= i. Whatever part of that a block of
keys holds falls into pieces without a mask, which every kernel computes at full speed: nothing that
is hidden is computed, and a window costs what it sees.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

Mask = Literal["full", "causal", "reversed"]


class Piece(NamedTuple):
    """Consecutive queries and the consecutive keys that they see, numbered along the row.

    Attributes:
        mask: `full`: every query sees every key. In the others there are as many queries as keys:
            `causal`: query number i sees the keys 0..i; `reversed`: the keys i and after.
    """

    queries: range
    keys: range
    mask: Mask


def visible_pieces(queries: range, keys: range, window: int | None = None) -> Iterator[Piece]:
    """What `queries` see of `keys`, each pair in exactly one piece.

    The causal piece of a query, which holds the query's own key, comes before its others.

    Args:
        queries, keys: of one document. Keys hold each of the queries, or none that is not earlier
            than all of them.
        window: how many keys a query sees, its own included; None is all.
    """
    assert keys.stop <= queries.start or _intersection(queries, keys) == queries
    size = len(queries) if window is None else window
    for start in range(queries.start, queries.stop, max(size, 1)):
        tile = range(start, min(start + size, queries.stop))
        if tile.stop <= keys.stop:
            yield Piece(tile, tile, "causal")
        first_seen_by_all = keys.start if window is None else tile.stop - window
        seen_by_all = _intersection(keys, range(first_seen_by_all, tile.start))
        if seen_by_all:
            yield Piece(tile, seen_by_all, "full")
        if window is not None:
            leaving = _intersection(keys, range(tile.start - window + 1, tile.stop - window))
            yield from _leaving_pieces(tile, leaving, window)


def _leaving_pieces(tile: range, keys: range, window: int) -> Iterator[Piece]:
    """Of keys that leave the window one after the other, while the queries of a tile go on."""
    if not keys:
        return
    # The first key is last seen by the query window - 1 after it.
    see_all = _intersection(tile, range(tile.start, keys.start + window))
    if see_all:
        yield Piece(see_all, keys, "full")
    if len(keys) > 1:
        yield Piece(range(keys.start + window, keys.stop + window - 1), keys[1:], "reversed")


def _intersection(a: range, b: range) -> range:
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))
