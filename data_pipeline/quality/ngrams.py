"""How much of a text lies in repeated n-grams of its words (Rae et al. 2021, table A1)."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from data_pipeline.compiled import compiled
from data_pipeline.quality.words import Pieces

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
SHIFT = np.uint64(29)
HIGH_HALF = np.uint64(32)


def ngram_shares(words: Pieces, longest: int) -> Iterator[tuple[int, float, float]]:
    """For n = 2 to `longest`: n, the top n-gram's and all repeated n-grams' share of characters."""
    total = int(words.lengths.sum())
    for n, (top, repeated) in enumerate(_ngram_characters(*words, longest), start=2):
        yield n, int(top) / total, int(repeated) / total


@compiled
def _ngram_characters(
    hashes: NDArray[np.uint64], lengths: NDArray[np.int64], longest: int
) -> NDArray[np.int64]:
    """Characters [n - 2, 2] in the most frequent n-gram, and in all that repeat an earlier one.

    An n-gram can occur twice only where the (n-1)-gram at its start does, so each n looks at what
    is left of the n-gram before it, which soon is little.
    """
    words = len(lengths)
    ends = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))
    characters = np.zeros((max(0, min(longest, words) - 1), 2), np.int64)
    size = 4
    while size < words + words // 4:
        size *= 2
    mask = np.uint64(size - 1)
    keys = np.empty(size, np.uint64)
    counts = np.zeros(size, np.int32)
    slots = np.empty(words, np.int32)
    starts = np.arange(words)
    grams = hashes.copy()
    active = words
    for n in range(2, len(characters) + 2):
        most = top = repeated = covered = 0
        while active and starts[active - 1] + n > words:
            active -= 1
        for number in range(active):
            start = starts[number]
            gram = grams[number]
            gram = (gram ^ (gram >> SHIFT)) * MULTIPLIER + hashes[start + n - 1]
            grams[number] = gram
            slot = (gram ^ (gram >> HIGH_HALF)) & mask
            while counts[slot] and keys[slot] != gram:
                slot = (slot + np.uint64(1)) & mask
            keys[slot] = gram
            counts[slot] += 1
            slots[number] = slot
            if counts[slot] > 1:
                repeated += ends[start + n] - ends[max(start, covered)]
                covered = start + n
            length = ends[start + n] - ends[start]
            if counts[slot] > most:
                most, top = counts[slot], length
            elif counts[slot] == most:
                top = max(top, length)
        left = 0
        for number in range(active):
            if counts[slots[number]] > 1:
                starts[left], grams[left], slots[left] = (
                    starts[number],
                    grams[number],
                    slots[number],
                )
                left += 1
            else:
                counts[slots[number]] = 0
        for number in range(left):
            counts[slots[number]] = 0
        active = left
        if most > 1:
            characters[n - 2] = most * top, repeated
    return characters
