r"""Shingles of many texts as 64-bit hashes: runs of n lower-cased `\w+` words, as Python has them.

A text of fewer words is one shingle, a text without words has none.
"""

from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

# An odd multiplier of the polynomial hash over the words of a shingle.
WORD_BASE = 0xD1342543DE82EF95


def shingle_sets(texts: pa.Array, ngram: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The shingles of each text, sorted and without repeats.

    Args:
        texts: strings of valid UTF-8, none of them null.

    Returns:
        hashes: [m] uint64, text by text.
        first: [len(texts) + 1] int64: text i has hashes[first[i] : first[i + 1]].
    """
    from data_pipeline.dedup.characters import ascii_words, character_table
    from data_pipeline.dedup.text_kernels import hash_texts

    data, offsets = utf8(texts)
    hashes, first = hash_texts(data, offsets, powers(ngram), ascii_words(), character_table())
    bounds = first.tolist()
    for start, stop in pairwise(bounds):
        hashes[start:stop].sort()
    is_new = np.ones(len(hashes), np.bool_)
    is_new[1:] = hashes[1:] != hashes[:-1]
    is_new[first[:-1][np.diff(first) > 0]] = True
    return hashes[is_new], np.concatenate([[0], np.cumsum(is_new)])[first]


def shingles_in(sets: pa.LargeListArray) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Sets of shingles as `shingle_sets` has them, of which these were made."""
    first = sets.offsets.to_numpy()
    return sets.flatten().to_numpy(), first - first[0]


def powers(ngram: int) -> NDArray[np.uint64]:
    """The factors of the words of a shingle."""
    return np.multiply.accumulate(np.full(ngram, WORD_BASE, np.uint64))


def utf8(texts: pa.Array) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The bytes of an array of strings and where each one begins, without a copy."""
    texts = texts.cast(pa.large_string())
    _, offsets, data = texts.buffers()
    if data is None:
        data = pa.py_buffer(b"")
    starts = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return np.frombuffer(data, np.uint8), starts
