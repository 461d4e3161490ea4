"""Disjoint sets of the nodes of a range, compiled by numba.

`parent` is a forest over places in the range: a root is its own parent and the smallest of its
tree. `link` holds, for a root, one node below the range that its set is joined with, or -1.
"""

import numpy as np
from numpy.typing import NDArray

from data_pipeline.compiled import compiled


@compiled
def find_root(parent: NDArray[np.int32], place: int) -> int:
    while parent[place] != place:
        parent[place] = parent[parent[place]]
        place = parent[place]
    return place


@compiled
def flatten_range(parent: NDArray[np.int32]) -> None:
    """Make each place's root its parent."""
    for place in range(len(parent)):
        parent[place] = parent[parent[place]]


@compiled
def join_edges(
    edges: NDArray[np.int64], first: int, parent: NDArray[np.int32], link: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Join the sets of edges (higher node, lower node), the higher one in the range.

    Args:
        edges: [edges, 2].
        first: the first node of the range.

    Returns:
        [n, 2], edges of nodes below the range that must be joined in place of those that were read.
    """
    passed_on = np.empty_like(edges)
    n = 0
    for edge in range(len(edges)):
        root = find_root(parent, edges[edge, 0] - first)
        below = edges[edge, 1]
        if below >= first:
            other = find_root(parent, below - first)
            if other == root:
                continue
            root, joined = min(root, other), max(root, other)
            parent[joined] = root
            below = link[joined]
            link[joined] = -1
        if below >= 0 and link[root] < 0:
            link[root] = below
        elif below >= 0 and link[root] != below:
            passed_on[n, 0] = max(link[root], below)
            passed_on[n, 1] = min(link[root], below)
            n += 1
    return passed_on[:n]
