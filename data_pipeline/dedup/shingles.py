"""Word n-grams of many texts at once, as 64-bit hashes."""

import sys
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data_pipeline.hashing import mix64

# The arrays over one slice of the texts stay in the processor's cache.
CHARACTERS_AT_ONCE = 1 << 18
# Odd multipliers of the polynomial hashes over the characters of a word and the words of a shingle.
CHARACTER_BASE = 0x9E3779B97F4A7C15
WORD_BASE = 0xD1342543DE82EF95


def shingle_hashes(
    texts: Sequence[str], ngram: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    r"""Hash the shingles of each text: its runs of `ngram` lower-cased `\w+` words.

    A text of fewer words is one shingle, a text without words has none.

    Returns:
        hashes: [m] uint64, text by text, repeated shingles included.
        first: [len(texts) + 1] int64: text i has hashes [first[i], first[i + 1]).
    """
    ends = np.cumsum([len(text) for text in texts])
    cuts = np.flatnonzero(np.diff(ends // CHARACTERS_AT_ONCE)) + 1
    bounds = [0, *cuts.tolist(), len(texts)]
    slices = [_hash_slice(texts[a:b], ngram) for a, b in pairwise(bounds)]
    counts = np.concatenate([count for _, count in slices])
    return np.concatenate([hashes for hashes, _ in slices]), np.concatenate([[0], counts.cumsum()])


def _hash_slice(texts: Sequence[str], ngram: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """All shingles' hashes, and the number of shingles of each text."""
    lowered = [text.lower() for text in texts]
    characters = np.frombuffer("\n".join(lowered).encode("utf-32-le"), np.uint32)
    words, starts = _word_hashes(characters)
    text_ends = np.cumsum([len(text) + 1 for text in lowered])
    first_word = np.concatenate([[0], np.searchsorted(starts, text_ends)])

    counts = np.diff(first_word)
    place = np.arange(len(words))
    left_in_text = np.repeat(first_word[1:], counts) - place
    hashes = np.zeros(len(words), np.uint64)
    padded = np.concatenate([words, np.zeros(ngram, np.uint64)])
    for k, power in enumerate(_powers(WORD_BASE, ngram)):
        hashes += np.where(left_in_text > k, padded[k : k + len(words)] * power, np.uint64(0))
    begins_text = np.repeat(first_word[:-1], counts) == place
    shingles = np.where(counts > 0, np.maximum(counts - ngram + 1, 1), 0)
    return mix64(hashes[(left_in_text >= ngram) | begins_text]), shingles


def _word_hashes(
    characters: NDArray[np.uint32],
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hash and start of every word.

    The sum of c_i B^i over a word that starts at s, times B^-s, does not depend on s.
    """
    in_word = _word_characters()[characters]
    starts = np.flatnonzero(in_word[1:] & ~in_word[:-1]) + 1
    if in_word[:1].any():
        starts = np.concatenate([[0], starts])
    if not len(starts):
        return np.zeros(0, np.uint64), starts
    terms = characters * in_word * _powers(CHARACTER_BASE, len(characters))
    inverse = _powers(pow(CHARACTER_BASE, -1, 1 << 64), len(characters))
    return mix64(np.add.reduceat(terms, starts) * inverse[starts]), starts


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """base, base^2, ... modulo 2^64."""
    return _power_table(base, 1 << count.bit_length())[:count]


@lru_cache(maxsize=4)
def _power_table(base: int, count: int) -> NDArray[np.uint64]:
    return np.multiply.accumulate(np.full(count, base, np.uint64))


@cache
def _word_characters() -> NDArray[np.bool_]:
    r"""Whether each code point matches `\w`, as the `re` module defines it."""
    table = [chr(point).isalnum() for point in range(sys.maxunicode + 1)]
    table[ord("_")] = True
    return np.array(table)


def jaccard(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    """|a & b| / |a | b| of two non-empty arrays, each sorted and without repeats."""
    place = np.minimum(np.searchsorted(a, b), len(a) - 1)
    common = int(np.count_nonzero(a[place] == b))
    return common / (len(a) + len(b) - common)
