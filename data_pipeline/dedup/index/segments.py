"""What an index holds of documents: immutable segments, one for each batch of a dump.

Documents are numbered through all dumps. A segment has, in the order of its documents, their ids,
their preference, the first document with the same text, and the shingles of those first ones; and,
sorted by hash, the tables that later documents are looked up in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.dedup.index.columns import Column
from data_pipeline.dedup.signed import DIGEST

COLUMNS: dict[str, Any] = {
    "preference": np.int64,  # greater for the one to keep of a cluster
    "original": np.int64,  # the first document with the same text
    "id_bytes": np.uint8,
    "id_first": np.int64,  # [documents + 1], where each id begins
    "shingles": np.uint64,  # of the originals, sorted sets
    "shingle_first": np.int64,  # [documents + 1], where each set begins
    "id_digests": DIGEST,  # sorted, and their documents, counted in the segment
    "id_documents": np.uint32,
    "text_digests": DIGEST,  # as ids; not those of blank texts
    "text_documents": np.uint32,
}
BAND = "band-{:03d}"  # sorted, hash << 32 | document, of the originals with words


@dataclass(frozen=True)
class Segment:
    """A folder of columns.

    Attributes:
        first: the number of its first document.
    """

    folder: Path
    first: int
    documents: int

    @property
    def stop(self) -> int:
        return self.first + self.documents

    def column(self, name: str) -> Column:
        return Column(self.folder / name, COLUMNS[name])

    def band(self, number: int) -> Column:
        return Column(self.folder / BAND.format(number), np.uint64)

    def sets(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """The shingles of some documents, counted in the segment, and how many each one has."""
        bounds = self.column("shingle_first").take(np.concatenate([rows, rows + 1]))
        return _ranges(self.column("shingles"), bounds[: len(rows)], bounds[len(rows) :])

    def ids(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The bytes of the ids of some documents, and how many each one has."""
        bounds = self.column("id_first").take(np.concatenate([rows, rows + 1]))
        return _ranges(self.column("id_bytes"), bounds[: len(rows)], bounds[len(rows) :])


class Segments:
    """All documents of the segments, in order."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.all = tuple(segments)
        self._first = np.array([segment.first for segment in segments], np.int64)

    @property
    def documents(self) -> int:
        return self.all[-1].stop if self.all else 0

    def with_documents(
        self, documents: NDArray[np.int64]
    ) -> Iterator[tuple[Segment, NDArray[np.int64]]]:
        """The segments that hold some of the documents, and the places of these in the array."""
        owner = np.searchsorted(self._first, documents, "right") - 1
        order = np.argsort(owner, kind="stable")
        begins = np.flatnonzero(np.diff(owner[order], prepend=-1)).tolist()
        for begin, end in pairwise([*begins, len(order)]):
            yield self.all[owner[order[begin]]], order[begin:end]

    def take(self, name: str, documents: NDArray[np.int64]) -> NDArray[Any]:
        values = np.empty(len(documents), COLUMNS[name])
        for segment, places in self.with_documents(documents):
            values[places] = segment.column(name).take(documents[places] - segment.first)
        return values

    def set_sizes(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many shingles each document has."""
        sizes = np.empty(len(documents), np.int64)
        for segment, places in self.with_documents(documents):
            rows = documents[places] - segment.first
            bounds = segment.column("shingle_first").take(np.concatenate([rows, rows + 1]))
            sizes[places] = bounds[len(rows) :] - bounds[: len(rows)]
        return sizes

    def sets(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """The shingle sets of documents in ascending order, as `shingle_sets` has them."""
        pieces = [
            segment.sets(documents[places] - segment.first)
            for segment, places in self.with_documents(documents)
        ]
        hashes = np.concatenate([np.empty(0, np.uint64), *(piece[0] for piece in pieces)])
        return hashes, np.cumsum(np.concatenate([[0], *(piece[1] for piece in pieces)]))

    def ids(self, documents: NDArray[np.int64]) -> pa.Array:
        """The ids of documents in any order."""
        numbers, places = np.unique(documents, return_inverse=True)
        pieces = [
            segment.ids(numbers[some] - segment.first)
            for segment, some in self.with_documents(numbers)
        ]
        data = np.concatenate([np.empty(0, np.uint8), *(piece[0] for piece in pieces)])
        offsets = np.cumsum(np.concatenate([[0], *(piece[1] for piece in pieces)]), dtype=np.int64)
        ids = pa.LargeStringArray.from_buffers(
            len(numbers), pa.py_buffer(offsets), pa.py_buffer(data)
        )
        return ids.take(pa.array(places))

    def find(self, table: str, digests: NDArray[Any]) -> NDArray[np.int64]:
        """The first document with each digest, -1 where there is none.

        Args:
            table: "id" or "text".
            digests: sorted, without repeats.
        """
        found = np.full(len(digests), -1, np.int64)
        if not len(digests):
            return found
        for segment in self.all:
            documents = segment.column(f"{table}_documents")
            row = 0
            for chunk in segment.column(f"{table}_digests").chunks():
                places = np.minimum(np.searchsorted(digests, chunk), len(digests) - 1)
                rows = np.flatnonzero(digests[places] == chunk)
                # Equal digests are in the order of documents: the first one is written last.
                rows = rows[::-1][found[places[rows[::-1]]] < 0]
                found[places[rows]] = segment.first + documents.take(row + rows).astype(np.int64)
                row += len(chunk)
        return found


def _ranges(
    column: Column, starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    sizes = stops - starts
    before = np.cumsum(sizes) - sizes
    rows = np.arange(int(sizes.sum())) + np.repeat(starts - before, sizes)
    return column.take(rows), sizes
