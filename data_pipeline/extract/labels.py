"""How much of each block a reference text of its page holds."""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WORD = re.compile(r"\w+")
SHINGLE = 4
CONTEXT = 3
MARGIN = 5  # blocks that the main text may begin before, or end after, its first or last long one


def words(text: str) -> list[str]:
    return WORD.findall(text)


def coverage(blocks: Sequence[str], reference: str) -> NDArray[np.float64]:
    """The share, [blocks], of each block's words that the reference has; NaN where it has no words.

    A block of fewer than four words says little by itself: it counts if it is a line of the
    reference, or stands there beside the words of the block before or after it.
    """
    of_block = [words(block) for block in blocks]
    of_reference = words(reference)
    shingles = set(_runs(of_reference, SHINGLE))
    shares = np.array([_share(block, shingles) for block in of_block], dtype=np.float64)
    long = np.flatnonzero(shares > 0.5)
    if not len(long):
        return shares
    lines = {tuple(words(line)) for line in reference.splitlines()}
    running = f" {' '.join(of_reference)} "
    for index in range(max(0, long[0] - MARGIN), min(len(blocks), long[-1] + MARGIN + 1)):
        block = of_block[index]
        if 0 < len(block) < SHINGLE:
            before = of_block[index - 1][-CONTEXT:] if index else []
            after = of_block[index + 1][:CONTEXT] if index + 1 < len(blocks) else []
            shares[index] = tuple(block) in lines or any(
                len(beside) > 0 and len(phrase) >= CONTEXT and f" {' '.join(phrase)} " in running
                for beside, phrase in ((before, before + block), (after, block + after))
            )
    return shares


def _runs(sequence: list[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(sequence[at : at + length]) for at in range(len(sequence) - length + 1)]


def _share(block: list[str], shingles: set[tuple[str, ...]]) -> float:
    if not block:
        return np.nan
    is_covered = np.zeros(len(block), dtype=np.bool_)
    for at, run in enumerate(_runs(block, SHINGLE)):
        if run in shingles:
            is_covered[at : at + SHINGLE] = True
    return float(is_covered.mean())
