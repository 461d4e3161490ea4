"""A pseudorandom permutation without memory."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.compiled import compiled

FEISTEL_ROUNDS = 6
Array = NDArray[Any]


@compiled
def mix64(x: np.uint64) -> np.uint64:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014), a bijection."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def permute_range(first: int, size: int, half: int, keys: Array, places: Array) -> None:
    """Fill `places` with those of `first` and what follows it in a permutation of [0, size).

    A Feistel network over 2 * half bits, walked along its cycles until it lands below `size`
    (Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains, section 3).

    Args:
        keys: [rounds] uint64.
    """
    bits = np.uint64(half)
    mask = (np.uint64(1) << bits) - np.uint64(1)
    for i in range(len(places)):
        place = np.uint64(first + i)
        while True:
            left, right = place >> bits, place & mask
            for key in keys:
                left, right = right, left ^ (mix64(right ^ key) & mask)
            place = (left << bits) | right
            if place < np.uint64(size):
                break
        places[i] = np.int64(place)
