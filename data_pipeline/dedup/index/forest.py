"""Disjoint sets over the clusters that something new may join, a few of all there are."""

import numpy as np
from numpy.typing import NDArray


class Forest:
    """A forest of disjoint sets of numbers; each root is the smallest of its tree.

    Attributes:
        numbers: sorted int64.
        parent: int64, places in `numbers`.
    """

    def __init__(self, numbers: NDArray[np.int64]) -> None:
        """Of sorted numbers, each one alone."""
        self._own = numbers
        self.numbers = numbers
        self.parent = np.arange(len(numbers))

    def places(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The place of each number; those not seen before are added."""
        wanted = np.unique(numbers)
        if not self._holds(wanted).all():
            union = np.union1d(self.numbers, wanted)
            parent = np.arange(len(union))
            moved = np.searchsorted(union, self.numbers)
            parent[moved] = moved[self.parent]
            self.numbers, self.parent = union, parent
        return np.searchsorted(self.numbers, numbers)

    def forget_singles(self) -> None:
        """Drop what was added and has joined nothing."""
        joined = self.parent != np.arange(len(self.parent))
        stays = joined.copy()
        stays[self.parent[joined]] = True
        stays[np.searchsorted(self.numbers, self._own)] = True
        self.parent = (np.cumsum(stays) - 1)[self.parent[stays]]
        self.numbers = self.numbers[stays]

    def roots(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The root of each number; of one that is not held, itself."""
        from data_pipeline.dedup.set_kernels import flatten

        flatten(self.parent)
        is_held = self._holds(numbers)
        result = numbers.copy()
        places = np.searchsorted(self.numbers, numbers[is_held])
        result[is_held] = self.numbers[self.parent[places]]
        return result

    def _holds(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        return contains(self.numbers, numbers)


def contains(held: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the numbers are among the sorted ones that are held."""
    if not len(held):
        return np.zeros(len(numbers), np.bool_)
    places = np.minimum(np.searchsorted(held, numbers), len(held) - 1)
    return held[places] == numbers
