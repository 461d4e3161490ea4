"""Loops over the pages and the sorted tables of an index, compiled by numba."""

import numpy as np
from numpy.typing import NDArray

from data_pipeline.compiled import compiled

# An odd multiplier: each step of a checksum is a bijection, so that no single wrong word escapes.
MIX = np.uint64(0x9E3779B97F4A7C15)
HALF = np.uint64(32)
LOW_HALF = np.uint64(0xFFFFFFFF)


@compiled
def checksums(pages: NDArray[np.uint64], first_page: int) -> NDArray[np.uint64]:
    """A checksum of each page's place and words, all but the last."""
    sums = np.empty(len(pages), np.uint64)
    for page in range(len(pages)):
        state = np.uint64(first_page + page + 1) * MIX
        for word in range(pages.shape[1] - 1):
            state = (state ^ pages[page, word]) * MIX
            state ^= state >> HALF
        sums[page] = state
    return sums


@compiled
def match_sorted(
    rows: NDArray[np.uint64], wanted: NDArray[np.uint32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of a band whose hash is wanted.

    Args:
        rows: sorted, hash << 32 | document.
        wanted: sorted hashes without repeats.

    Returns:
        Of each found row the place of its hash in `wanted`, and its document.
    """
    places = np.empty(len(rows), np.int64)
    documents = np.empty(len(rows), np.int64)
    found = place = 0
    for row in rows:
        key = row >> HALF
        while place < len(wanted) and np.uint64(wanted[place]) < key:
            place += 1
        if place == len(wanted):
            break
        if np.uint64(wanted[place]) == key:
            places[found] = place
            documents[found] = np.int64(row & LOW_HALF)
            found += 1
    return places[:found].copy(), documents[:found].copy()


@compiled
def admit(
    places: NDArray[np.int64],
    is_new: NDArray[np.bool_],
    most: int,
    sizes: NDArray[np.int64],
    is_open: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Which further rows of buckets are needed to compare the new documents.

    These are the first `most` of a bucket, the new ones, and all the others where one of the first
    is new.

    Args:
        places: the bucket of each row, in the order of documents.
        sizes: of each bucket, how many rows there were before; updated.
        is_open: of each bucket, whether one of the first is new; updated.
    """
    is_needed = np.empty(len(places), np.bool_)
    for row in range(len(places)):
        bucket = places[row]
        is_first = sizes[bucket] < most
        sizes[bucket] += 1
        is_open[bucket] |= is_first and is_new[row]
        is_needed[row] = is_first or is_new[row] or is_open[bucket]
    return is_needed
