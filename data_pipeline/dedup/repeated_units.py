"""Exact deduplication below the document: paragraphs or lines that stood in one before."""

import hashlib
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Unit = Literal["paragraph", "line"]
SEPARATORS: dict[Unit, str] = {"paragraph": "\n\n", "line": "\n"}
WORD = re.compile(r"\w")
SMALLEST_TABLE = 1 << 16


class RepeatedUnits:
    """Removes from text after text the units seen before, as in CCNet (Wenzek et al. 2019).

    Units are equal if they are so without the white space around them; those without a word are
    never removed. Kept in memory are 64 bits of the hash of each unit, 16 to 32 bytes in all.
    """

    def __init__(self, unit: Unit) -> None:
        self._separator = SEPARATORS[unit]
        self._table = np.zeros(SMALLEST_TABLE, np.uint64)
        self._seen = 0

    def remove(self, texts: Sequence[str]) -> tuple[list[str], list[int]]:
        """The texts without their repeated units, and how many of them each one had."""
        units = [text.split(self._separator) for text in texts]
        hashes = [_hash(unit) for parts in units for unit in parts if has_words(unit)]
        is_new = iter(self._insert(hashes).tolist())
        left = [[unit for unit in parts if not has_words(unit) or next(is_new)] for parts in units]
        removed = [len(parts) - len(rest) for parts, rest in zip(units, left, strict=True)]
        return [self._separator.join(rest) for rest in left], removed

    def _insert(self, hashes: Sequence[int]) -> NDArray[np.bool_]:
        from data_pipeline.dedup.set_kernels import insert_new

        while len(self._table) < 2 * (self._seen + len(hashes)):
            seen = self._table[self._table != 0]
            self._table = np.zeros(2 * len(self._table), np.uint64)
            insert_new(self._table, seen)
        is_new: NDArray[np.bool_] = insert_new(self._table, np.array(hashes, np.uint64))
        self._seen += int(is_new.sum())
        return is_new


def has_words(text: str) -> bool:
    return WORD.search(text) is not None


def _hash(unit: str) -> int:
    digest = hashlib.blake2b(unit.strip().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
