"""MinHash signatures (Broder 1997) and their LSH bands (Indyk and Motwani 1998)."""

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.hashing import mix64

PERMUTATION_SEED = 20_221_107
PERMUTATIONS = 256
RECALL_AT_THRESHOLD = 0.95


def candidate_probability(similarity: float, bands: int, rows: int) -> float:
    """The probability that two sets of this Jaccard similarity agree in a band."""
    return 1 - (1 - similarity**rows) ** bands


def choose_bands(threshold: float) -> tuple[int, int]:
    """Bands and rows that make 95 of 100 pairs at `threshold` candidates, and more above it.

    Of those that take at most 256 permutations, the most rows: they give the fewest candidates
    below the threshold.

    Raises:
        DataError: 256 bands of a single row are too few for a similarity this low.
    """
    for rows in range(PERMUTATIONS, 0, -1):
        bands = PERMUTATIONS // rows
        if candidate_probability(threshold, bands, rows) >= RECALL_AT_THRESHOLD:
            return bands, rows
    lowest = 1 - (1 - RECALL_AT_THRESHOLD) ** (1 / PERMUTATIONS)
    raise DataError(
        f"threshold={threshold} is too low to find its pairs: use at least {lowest:.3f}"
    )


def minhash(
    hashes: NDArray[np.uint64], first: NDArray[np.int64], permutations: int
) -> NDArray[np.uint32]:
    """The smallest hash of each set under each permutation, [sets, permutations].

    Set i is hashes[first[i] : first[i + 1]] and must not be empty. A permutation is
    x -> a x + b modulo 2^32 with a odd, on 32 well-mixed bits of the hash.
    """
    random = np.random.default_rng(PERMUTATION_SEED)
    a = random.integers(0, 1 << 31, permutations, np.uint32) * np.uint32(2) + np.uint32(1)
    b = random.integers(0, 1 << 32, permutations, np.uint32)
    x = (hashes >> np.uint64(32)).astype(np.uint32)
    permuted = np.empty_like(x)
    signatures = np.empty((permutations, len(first) - 1), np.uint32)
    for i in range(permutations):
        np.multiply(x, a[i], out=permuted)
        np.add(permuted, b[i], out=permuted)
        np.minimum.reduceat(permuted, first[:-1], out=signatures[i])
    return signatures.T


def band_hashes(signatures: NDArray[np.uint32], bands: int, rows: int) -> NDArray[np.uint64]:
    """One hash per band of `rows` minima, [sets, bands]; equal bands of one number agree."""
    cells = signatures.reshape(len(signatures), bands, rows).astype(np.uint64)
    result = np.broadcast_to(np.arange(bands, dtype=np.uint64), cells.shape[:2])
    for row in range(rows):
        result = mix64(result ^ cells[:, :, row])
    return result
