"""Jaccard similarity and connected components over sorted sets of hashes, compiled by numba.

Set s is hashes[first[s] : first[s + 1]], sorted and without repeats. `parent` is a forest of
disjoint sets of documents: a root is its own parent and the smallest of its tree.
"""

import numpy as np
from numpy.typing import NDArray

from data_pipeline.compiled import compiled


@compiled
def jaccard(hashes: NDArray[np.uint64], first: NDArray[np.int64], s: int, t: int) -> float:
    """|s & t| / |s | t| of two sets that are not empty."""
    i, s_end, j, t_end = first[s], first[s + 1], first[t], first[t + 1]
    size = s_end - i + t_end - j
    common = 0
    while i < s_end and j < t_end:
        x, y = hashes[i], hashes[j]
        common += x == y
        i += x <= y
        j += y <= x
    return common / (size - common)


@compiled
def jaccards(
    hashes: NDArray[np.uint64],
    first: NDArray[np.int64],
    left: NDArray[np.int64],
    right: NDArray[np.int64],
) -> NDArray[np.float64]:
    """The similarity of each pair of sets."""
    similarities = np.empty(len(left), np.float64)
    for pair in range(len(left)):
        similarities[pair] = jaccard(hashes, first, left[pair], right[pair])
    return similarities


@compiled
def find(parent: NDArray[np.int64], node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


@compiled
def flatten(parent: NDArray[np.int64]) -> None:
    """Make each node's root its parent."""
    for node in range(len(parent)):
        parent[node] = parent[parent[node]]


@compiled
def join_similar(
    documents: NDArray[np.int64],
    sets: NDArray[np.int64],
    is_new: NDArray[np.bool_],
    starts: NDArray[np.int64],
    parent: NDArray[np.int64],
    hashes: NDArray[np.uint64],
    first: NDArray[np.int64],
    threshold: float,
    most: int,
) -> int:
    """Join the documents of each bucket that are similar; return how many pairs were compared.

    A pair is compared if one of the two is among the first `most` of its bucket, one is new, and
    they are not joined already. So the trees depend neither on the order of the buckets nor on
    which documents came first as new ones.

    Args:
        documents: bucket by bucket, `sets` the number of each one's set.
        starts: where each bucket begins, and the end of the last one.
    """
    longest = 0
    for bucket in range(len(starts) - 1):
        longest = max(longest, starts[bucket + 1] - starts[bucket])
    # Groups of joined documents among the first ones, as linked lists over the places.
    following = np.empty(min(longest, most), np.int64)
    heads = np.empty(min(longest, most), np.int64)
    tails = np.empty(min(longest, most), np.int64)
    compared = 0
    for bucket in range(len(starts) - 1):
        start = starts[bucket]
        groups = 0
        for place in range(starts[bucket + 1] - start):
            document = documents[start + place]
            is_first = place < most
            head = place
            kept = 0
            for group in range(groups):
                other = heads[group]
                similar = find(parent, documents[start + other]) == find(parent, document)
                while not similar and other >= 0:
                    if is_new[start + place] or is_new[start + other]:
                        compared += 1
                        a, b = sets[start + place], sets[start + other]
                        similar = jaccard(hashes, first, a, b) >= threshold
                    other = following[other]
                if similar:
                    a = find(parent, document)
                    b = find(parent, documents[start + heads[group]])
                    parent[max(a, b)] = min(a, b)
                if similar and is_first:
                    following[tails[group]] = head
                    head = heads[group]
                else:
                    heads[kept], tails[kept] = heads[group], tails[group]
                    kept += 1
            if is_first:
                following[place] = -1
                heads[kept], tails[kept] = head, place
                kept += 1
            groups = kept
    return compared


@compiled
def insert_new(table: NDArray[np.uint64], numbers: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Insert numbers other than 0 into a hash table; return which ones it did not hold.

    The table has 2^n places, 0 where they are empty, and some must stay so.
    """
    is_new = np.empty(len(numbers), np.bool_)
    mask = np.uint64(len(table) - 1)
    for i in range(len(numbers)):
        place = numbers[i] & mask
        while table[place] != 0 and table[place] != numbers[i]:
            place = (place + np.uint64(1)) & mask
        is_new[i] = table[place] == 0
        table[place] = numbers[i]
    return is_new
