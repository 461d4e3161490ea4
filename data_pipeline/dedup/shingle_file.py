"""A second pass over the documents: the shingle sets of the candidates, on disk."""

import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.dedup.batches import Batch, map_batches, read_batches
from data_pipeline.dedup.inputs import Part
from data_pipeline.dedup.shingles import shingle_sets, shingles_in


class ShingleFile:
    """The sorted shingle sets of some documents, 8 bytes a shingle, mapped into memory.

    Attributes:
        hashes: uint64.
        first: int64; set s is hashes[first[s] : first[s + 1]].
    """

    def __init__(
        self,
        path: Path,
        parts: Sequence[Part],
        documents: NDArray[np.int64],
        *,
        ngram: int,
        workers: int,
    ) -> None:
        """Write the sets of `documents`, sorted numbers, to a new file."""
        self._documents = documents
        wanted = np.zeros(sum(part.rows for part in parts), np.bool_)
        wanted[documents] = True

        def sets_of_batch(batch: Batch) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
            mask = pa.array(wanted[batch.row : batch.row + len(batch.records)])
            if batch.is_signed:
                return shingles_in(batch.records["shingles"].filter(mask))
            return shingle_sets(batch.records["text"].filter(mask), ngram)

        sizes = [np.zeros(1, np.int64)]
        with path.open("w+b") as file:
            if len(documents):
                batches = read_batches(parts, ["text"], ["shingles"])
                for hashes, first in map_batches(sets_of_batch, batches, workers):
                    hashes.tofile(file)
                    sizes.append(np.diff(first))
            file.flush()
            has_any = file.tell() > 0
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if has_any else None
        self.first: NDArray[np.int64] = np.cumsum(np.concatenate(sizes))
        self.hashes: NDArray[np.uint64] = np.frombuffer(self._map or b"", np.uint64)

    def sets_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of each document's set."""
        return np.searchsorted(self._documents, documents)

    def sizes(self, sets: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.first[sets + 1] - self.first[sets]

    def forget(self) -> None:
        """Give back the memory of what was read; it stays readable."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
