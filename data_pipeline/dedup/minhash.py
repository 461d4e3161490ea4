"""MinHash signatures (Broder 1997) and their LSH bands (Indyk and Motwani 1998)."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.dedup.shingles import powers, utf8
from data_pipeline.errors import DataError

PERMUTATION_SEED = 20_221_107
PERMUTATIONS = 256
RECALL_AT_THRESHOLD = 0.95
# 112 permutations as FineWeb has them (Penedo et al. 2024); they find 92 of 100 pairs at 0.8.
FINEWEB_BANDS = (14, 8)
FINEWEB_RECALL = 0.9


def candidate_probability(similarity: float, bands: int, rows: int) -> float:
    """The probability that two sets of this Jaccard similarity agree in a band."""
    return 1 - (1 - similarity**rows) ** bands


def choose_bands(threshold: float) -> tuple[int, int]:
    """Bands and rows for a threshold: 14 and 8 where they find 90 of 100 pairs right at it.

    Below, those that find 95 of 100: of all that take at most 256 permutations, the most rows,
    which give the fewest candidates below the threshold.

    Raises:
        DataError: 256 bands of a single row are too few for a similarity this low.
    """
    if candidate_probability(threshold, *FINEWEB_BANDS) >= FINEWEB_RECALL:
        return FINEWEB_BANDS
    for rows in range(PERMUTATIONS, 0, -1):
        bands = PERMUTATIONS // rows
        if candidate_probability(threshold, bands, rows) >= RECALL_AT_THRESHOLD:
            return bands, rows
    lowest = 1 - (1 - RECALL_AT_THRESHOLD) ** (1 / PERMUTATIONS)
    raise DataError(
        f"threshold={threshold} is too low to find its pairs: use at least {lowest:.3f}"
    )


def minhash(
    texts: pa.Array, permutations: int, ngram: int
) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """The smallest hash of each text's shingles under each permutation.

    A permutation is x -> a x + b modulo 2^32 with a odd, on 32 well-mixed bits of the hash.

    Returns:
        minima: [texts, permutations]; 2^32 - 1 for a text without words.
        has_words: [texts].
    """
    from data_pipeline.dedup.characters import ascii_words, character_table
    from data_pipeline.dedup.text_kernels import sign_texts

    random = np.random.default_rng(PERMUTATION_SEED)
    a = random.integers(0, 1 << 31, permutations, np.uint32) * np.uint32(2) + np.uint32(1)
    b = random.integers(0, 1 << 32, permutations, np.uint32)
    minima = np.full((len(texts), permutations), np.iinfo(np.uint32).max, np.uint32)
    data, offsets = utf8(texts)
    has_words = sign_texts(
        data, offsets, powers(ngram), ascii_words(), character_table(), a, b, minima
    )
    return minima, has_words


def sign(
    texts: pa.Array, *, bands: int, rows: int, ngram: int
) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """One hash per band of `rows` minima, [bands, texts]; and which texts have words."""
    from data_pipeline.dedup.text_kernels import hash_bands

    minima, has_words = minhash(texts, bands * rows, ngram)
    return hash_bands(minima, bands), has_words
