"""Locality-sensitive hashing: the documents that share a band are candidates."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HALF = np.uint64(32)
LOW_HALF = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class Buckets:
    """Groups of two or more documents.

    Attributes:
        documents: int64, bucket by bucket, each in input order.
        starts: int64, where each bucket begins, and the end of the last one.
    """

    documents: NDArray[np.int64]
    starts: NDArray[np.int64]

    def split(self, sizes: NDArray[np.int64], limit: int) -> Iterator["Buckets"]:
        """Consecutive buckets whose documents have a total size of about `limit`."""
        totals = np.concatenate([[0], np.cumsum(sizes)])[self.starts]
        cuts = np.flatnonzero(np.diff(totals // limit)) + 1
        for first, last in zip([0, *cuts], [*cuts, len(self.starts) - 1], strict=True):
            if first < last:
                start, stop = self.starts[first], self.starts[last]
                yield Buckets(self.documents[start:stop], self.starts[first : last + 1] - start)


def share_band(band: NDArray[np.uint32], documents: NDArray[np.int64]) -> Buckets:
    """Those of the documents, of all fewer than 2^32, whose hashes in a band are equal."""
    keys = band[documents].astype(np.uint64) << HALF | documents.astype(np.uint64)
    keys.sort()
    hashes = keys >> HALF
    as_before = np.zeros(len(keys) + 1, np.bool_)
    as_before[1:-1] = hashes[1:] == hashes[:-1]
    shared = as_before[:-1] | as_before[1:]
    starts = np.flatnonzero(~as_before[:-1][shared])
    members = (keys[shared] & LOW_HALF).astype(np.int64)
    return Buckets(members, np.append(starts, len(members)))
