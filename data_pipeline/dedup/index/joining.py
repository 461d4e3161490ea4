"""Which clusters new documents join: a merge of their sorted bands with all tables of the index."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dedup import clusters
from data_pipeline.dedup.index.columns import Column
from data_pipeline.dedup.index.forest import Forest, contains
from data_pipeline.dedup.index.limits import Limits
from data_pipeline.dedup.index.segments import Segment, Segments
from data_pipeline.dedup.lsh import HALF, LOW_HALF

Roots = Callable[[NDArray[np.int64]], NDArray[np.int64]]
Bands = list[NDArray[np.uint32]]


def join_documents(
    segments: Segments,
    new: NDArray[np.int64],
    changed: Bands,
    roots: Roots,
    forest: Forest,
    *,
    threshold: float,
    limits: Limits,
) -> None:
    """Join the clusters of documents that share a band and are similar, if one of them is new.

    Args:
        segments: the new documents are in them, too.
        new: sorted numbers of documents with shingles.
        changed: of each band the sorted hashes of the buckets of which all documents count as new.
        roots: the root of the cluster of each document, as it was before.
        forest: over these roots; holds the new documents.
    """
    for band, hashes in enumerate(changed):
        wanted = np.union1d(hashes_of(segments, band, new), hashes)
        waiting = [wanted]
        while waiting:
            some = waiting.pop()
            is_changed = np.isin(some, hashes)
            buckets = _buckets(segments, band, some, new, is_changed, limits.rows)
            if buckets is None:
                half = len(some) // 2
                waiting += [some[half:], some[:half]]
                continue
            _join_buckets(segments, buckets, roots, forest, threshold, limits.shingles)
            forest.forget_singles()


class Buckets:
    """Documents that share a band, bucket by bucket.

    Attributes:
        documents: int64, of each bucket in ascending order.
        is_new: bool.
        starts: int64, where each bucket begins, and the end of the last one.
    """

    def __init__(
        self, numbers: NDArray[np.int64], documents: NDArray[np.int64], is_new: NDArray[np.bool_]
    ) -> None:
        """Of rows in the order of the numbers of their buckets."""
        self.documents = documents
        self.is_new = is_new
        begins = np.flatnonzero(np.diff(numbers, prepend=-1))
        self.starts = np.append(begins, len(numbers))

    def numbers(self) -> NDArray[np.int64]:
        """The number of each row's bucket."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def select(self, is_wanted: NDArray[np.bool_]) -> "Buckets":
        """Those buckets that are wanted."""
        rows = np.repeat(is_wanted, np.diff(self.starts))
        return Buckets(self.numbers()[rows], self.documents[rows], self.is_new[rows])

    def pieces(self, sizes: NDArray[np.int64], limit: int) -> Iterator["Buckets"]:
        """Buckets whose documents have a total size of about `limit`, or but one bucket.

        Of a larger one come the first documents, which all others are compared with, and some of
        the others at a time.
        """
        totals = np.concatenate([[0], np.cumsum(sizes)])
        cuts = np.flatnonzero(np.diff(totals[self.starts[:-1]] // limit)) + 1
        is_large = np.flatnonzero(np.diff(totals[self.starts]) > limit)
        bounds = np.unique(
            np.concatenate([[0], cuts, is_large, is_large + 1, [len(self.starts) - 1]])
        )
        for first, last in pairwise(bounds.tolist()):
            start, stop = int(self.starts[first]), int(self.starts[last])
            if last - first > 1 or totals[stop] - totals[start] <= limit:
                yield self._rows(np.arange(start, stop))
                continue
            heads = np.arange(start, min(start + clusters.MOST_COMPARISONS, stop))
            others = np.arange(heads[-1] + 1, stop)
            places = np.cumsum(sizes[others]) // limit
            for some in np.split(others, np.flatnonzero(np.diff(places)) + 1):
                yield self._rows(np.concatenate([heads, some]))

    def _rows(self, rows: NDArray[np.int64]) -> "Buckets":
        return Buckets(
            np.searchsorted(self.starts, rows, "right"), self.documents[rows], self.is_new[rows]
        )


def band_rows(segment: Segment, band: int, low: int, high: int) -> Iterator[NDArray[np.uint64]]:
    """The rows of a band table whose hash is at least `low` and at most `high`."""
    column = segment.band(band)
    yield from column.chunks(_first_row(column, low), _first_row(column, high + 1))


def _first_row(column: Column, hash_: int) -> int:
    """The first row with at least this hash."""
    low, high = 0, len(column)
    while low < high:
        middle = (low + high) // 2
        if int(column.read(middle, middle + 1)[0]) >> 32 < hash_:
            low = middle + 1
        else:
            high = middle
    return low


def hashes_of(segments: Segments, band: int, documents: NDArray[np.int64]) -> NDArray[np.uint32]:
    """The sorted hashes of a band that some of the documents have."""
    found = [np.empty(0, np.uint32)]
    for segment, places in segments.with_documents(documents):
        wanted = np.zeros(segment.documents, np.bool_)
        wanted[documents[places] - segment.first] = True
        for rows in segment.band(band).chunks():
            hashes = (rows[wanted[rows & LOW_HALF]] >> HALF).astype(np.uint32)
            found.append(np.unique(hashes))
    return np.unique(np.concatenate(found))


def _buckets(
    segments: Segments,
    band: int,
    wanted: NDArray[np.uint32],
    new: NDArray[np.int64],
    is_changed: NDArray[np.bool_],
    limit: int,
) -> Buckets | None:
    """The documents of the wanted hashes as far as they are compared; None if too many."""
    from data_pipeline.dedup.index.kernels import admit, match_sorted

    sizes = np.zeros(len(wanted), np.int64)
    is_open = is_changed.copy()
    none = np.empty(0, np.int64)
    found = [(none, none, np.empty(0, np.bool_))]
    rows_found = 0
    for segment in segments.all if len(wanted) else ():
        for rows in band_rows(segment, band, int(wanted[0]), int(wanted[-1])):
            places, documents = match_sorted(rows, wanted)
            documents += segment.first
            is_new = contains(new, documents) | is_changed[places]
            needed = admit(places, is_new, clusters.MOST_COMPARISONS, sizes, is_open)
            found.append((places[needed], documents[needed], is_new[needed]))
            rows_found += len(found[-1][0])
        if rows_found > limit and len(wanted) > 1:
            return None
    numbers, members, are_new = map(np.concatenate, zip(*found, strict=True))
    order = np.argsort(numbers, kind="stable")
    return Buckets(numbers[order], members[order], are_new[order])


def _join_buckets(
    segments: Segments,
    buckets: Buckets,
    roots: Roots,
    forest: Forest,
    threshold: float,
    limit: int,
) -> None:
    """Compare what is not joined already, some shingles at a time."""
    from data_pipeline.dedup.set_kernels import flatten, join_similar

    documents, rows = np.unique(buckets.documents, return_inverse=True)
    root = roots(documents)
    buckets = buckets.select(_is_open(buckets, forest.roots(root)[rows]))
    sizes = segments.set_sizes(documents)[np.searchsorted(documents, buckets.documents)]
    for piece in buckets.pieces(sizes, limit):
        members, sets = np.unique(piece.documents, return_inverse=True)
        hashes, first = segments.sets(members)
        nodes = forest.places(root[np.searchsorted(documents, piece.documents)])
        join_similar(
            nodes,
            sets,
            piece.is_new,
            piece.starts,
            forest.parent,
            hashes,
            first,
            threshold,
            clusters.MOST_COMPARISONS,
        )
        flatten(forest.parent)


def _is_open(buckets: Buckets, roots: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Of each bucket whether it has a new document, and documents that are not joined already."""
    begins = buckets.starts[:-1]
    if not len(begins):
        return np.empty(0, np.bool_)
    is_one = np.minimum.reduceat(roots, begins) == np.maximum.reduceat(roots, begins)
    return np.logical_or.reduceat(buckets.is_new, begins) & ~is_one
