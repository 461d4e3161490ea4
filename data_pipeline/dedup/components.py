"""Connected components of the near-duplicate graph."""

import numpy as np
from numpy.typing import NDArray


class UnionFind:
    """Disjoint sets of the nodes 0 .. size - 1; the smallest node of a set is its root."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def find(self, node: int) -> int:
        parent = self._parent
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    def union(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        self._parent[max(a, b)] = min(a, b)

    def roots(self) -> NDArray[np.int64]:
        """The root of every node."""
        return np.array([self.find(node) for node in range(len(self._parent))], np.int64)
