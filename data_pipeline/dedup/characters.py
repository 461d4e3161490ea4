r"""How Python lower-cases each character, and which ones `\w` matches, as tables."""

import re
import sys
from functools import cache

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dedup.text_kernels import (
    CAPITAL_SIGMA,
    CASE_IGNORABLE,
    CASED,
    FINAL_SIGMA,
    I_WITH_DOT,
    SIGMA,
    WORD,
)

SURROGATES = slice(0xD800, 0xE000)
# The planes that have letters; the others are empty or for private use.
ASSIGNED = (0, 0x40000), (0xE0000, 0xF0000)


@cache
def ascii_words() -> NDArray[np.uint8]:
    r"""For each byte the lower-cased character if `\w` matches it, else 0; [256]."""
    table = np.zeros(256, np.uint8)
    for point in range(128):
        if chr(point).isalnum() or chr(point) == "_":
            table[point] = ord(chr(point).lower())
    return table


@cache
def character_table() -> NDArray[np.uint32]:
    r"""What `str.lower()` makes of each code point, [0x110000].

    LOWER holds its lower-cased form, WORD whether `\w` matches that. The form of a capital sigma
    depends on its neighbours: those that are CASE_IGNORABLE are skipped, the next one is CASED or
    not.
    """
    points = np.concatenate([np.arange(*planes, dtype=np.uint32) for planes in ASSIGNED])
    points[SURROGATES] = 0  # UTF-8 has none
    lowered = _lower(points)
    lowered[CAPITAL_SIGMA] = SIGMA
    a, sigma, newline = (np.full(len(points), ord(letter), np.uint32) for letter in "aΣ\n")
    after_it = _lower(np.stack([points, sigma, newline], 1).ravel())[1::3] == FINAL_SIGMA
    behind_a = _lower(np.stack([a, points, sigma, newline], 1).ravel())[2::4] == FINAL_SIGMA
    neighbour = after_it * np.uint32(CASED) | (behind_a & ~after_it) * np.uint32(CASE_IGNORABLE)

    table = np.arange(sys.maxunicode + 1, dtype=np.uint32)
    is_word = np.zeros(len(table), np.uint32)
    for run in re.finditer(r"\w+", _decode(points)):
        is_word[points[run.start() : run.end()]] = WORD
    table[points] = lowered | is_word[lowered] | neighbour
    return table


def _lower(points: NDArray[np.uint32]) -> NDArray[np.uint32]:
    # Of one character, and cased as İ is.
    text = _decode(np.where(points == I_WITH_DOT, ord("I"), points))
    return np.frombuffer(text.lower().encode("utf-32-le"), np.uint32).copy()


def _decode(points: NDArray[np.uint32]) -> str:
    return points.astype("<u4").tobytes().decode("utf-32-le")
