"""The cluster of each document of an index: columns that are written anew by each change."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dedup.index.columns import ROWS_AT_ONCE, Column, ColumnWriter
from data_pipeline.dedup.index.forest import Forest, contains
from data_pipeline.dedup.index.segments import Segments

GONE = -1
STATE: dict[str, Any] = {
    "root": np.int64,  # the first document of the cluster
    "twin": np.int64,  # the one kept of it
    "jaccard": np.float64,  # similarity with the twin; 1 for itself
}


@dataclass(frozen=True)
class State:
    """A folder of columns, a row for each document; root and twin of a removed one are -1."""

    folder: Path

    def column(self, name: str) -> Column:
        return Column(self.folder / name, STATE[name])

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """The columns of some documents at a time, and the number of the first one."""
        columns = {name: self.column(name) for name in STATE}
        for row in range(start, stop, ROWS_AT_ONCE):
            end = min(row + ROWS_AT_ONCE, stop)
            yield row, {name: column.read(row, end) for name, column in columns.items()}


@dataclass(frozen=True)
class Fresh:
    """Documents of which the state knows nothing yet, or nothing that still holds.

    Attributes:
        documents: sorted int64.
        roots: of each one the root of the cluster of its text, as it was before.
    """

    documents: NDArray[np.int64]
    roots: NDArray[np.int64]


def fresh_documents(segments: Segments, state: State, documents: NDArray[np.int64]) -> Fresh:
    """Sorted documents that begin in clusters of their own, or in that of an equal text."""
    roots = segments.take("original", documents)
    is_older = ~contains(documents, roots)
    roots[is_older] = state.column("root").take(roots[is_older])
    return Fresh(documents, roots)


def roots_before(state: State, fresh: Fresh, documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """The roots of the clusters that documents were in before anything was joined."""
    roots = np.empty(len(documents), np.int64)
    is_fresh = contains(fresh.documents, documents)
    places = np.searchsorted(fresh.documents, documents[is_fresh])
    roots[is_fresh] = fresh.roots[places]
    roots[~is_fresh] = state.column("root").take(documents[~is_fresh])
    return roots


def write_state(
    folder: Path,
    segments: Segments,
    before: State,
    fresh: Fresh,
    forest: Forest,
    gone: NDArray[np.int64],
    shingles: int,
) -> State:
    """Write the clusters after the joins of the forest.

    Args:
        gone: sorted documents that are removed.
        shingles: so many of them are in memory at a time.
    """
    folder.mkdir()
    roots, kept = _kept_of_clusters(segments, before, fresh, forest)
    writers = {name: ColumnWriter(folder / name, kind) for name, kind in STATE.items()}
    known = len(before.column("root"))
    for start in range(0, segments.documents, ROWS_AT_ONCE):
        numbers = np.arange(start, min(start + ROWS_AT_ONCE, segments.documents))
        rows = _rows_before(before, numbers, known)
        is_gone = contains(gone, numbers) | (rows["root"] == GONE)
        is_fresh = contains(fresh.documents, numbers)
        places = np.searchsorted(fresh.documents, numbers[is_fresh])
        rows["root"][is_fresh] = fresh.roots[places]
        rows["root"] = forest.roots(rows["root"])
        is_touched = contains(roots, rows["root"]) & ~is_gone
        twin = rows["twin"].copy()
        twin[is_touched] = kept[np.searchsorted(roots, rows["root"][is_touched])]
        changed = np.flatnonzero(~is_gone & (is_fresh | (twin != rows["twin"])))
        rows["twin"] = twin
        rows["jaccard"][changed] = similarities(segments, numbers[changed], twin[changed], shingles)
        rows["root"][is_gone] = rows["twin"][is_gone] = GONE
        for name, writer in writers.items():
            writer.append(rows[name])
    for writer in writers.values():
        writer.close()
    return State(folder)


def _rows_before(state: State, numbers: NDArray[np.int64], known: int) -> dict[str, NDArray[Any]]:
    start, stop = int(numbers[0]), int(numbers[-1]) + 1
    rows = {name: numbers.astype(kind) for name, kind in STATE.items()}
    for name in STATE:
        old = state.column(name).read(start, min(stop, known))
        rows[name][: len(old)] = old
    return rows


def _kept_of_clusters(
    segments: Segments, before: State, fresh: Fresh, forest: Forest
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The roots of all clusters that something was done to, sorted, and the document kept of each.

    It is one that was kept of a cluster before, or a fresh one: the first of those preferred.
    """
    older = forest.numbers[~contains(fresh.documents, forest.numbers)]
    candidates = np.concatenate([before.column("twin").take(older), fresh.documents])
    clusters = forest.roots(np.concatenate([older, fresh.roots]))
    preference = segments.take("preference", candidates)
    order = np.lexsort((candidates, -preference, clusters))
    roots, first = np.unique(clusters[order], return_index=True)
    return roots, candidates[order[first]]


def similarities(
    segments: Segments, left: NDArray[np.int64], right: NDArray[np.int64], limit: int
) -> NDArray[np.float64]:
    """The Jaccard similarity of each pair of documents, which are equal or of one cluster.

    About `limit` shingles are in memory at a time.
    """
    from data_pipeline.dedup.set_kernels import jaccards

    result = np.ones(len(left))
    pairs = np.flatnonzero(left != right)
    a, b = (segments.take("original", documents[pairs]) for documents in (left, right))
    differ = a != b
    pairs, a, b = pairs[differ], a[differ], b[differ]
    sizes = segments.set_sizes(a) + segments.set_sizes(b)
    for some in np.split(
        np.arange(len(pairs)), np.flatnonzero(np.diff(np.cumsum(sizes) // limit)) + 1
    ):
        members, places = np.unique(np.concatenate([a[some], b[some]]), return_inverse=True)
        hashes, first = segments.sets(members)
        result[pairs[some]] = jaccards(hashes, first, places[: len(some)], places[len(some) :])
    return result
