"""Clusters of duplicates, from signatures to the document that survives each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.dedup.components import UnionFind
from data_pipeline.dedup.lsh import Signatures, bucket_documents, shingle_sets
from data_pipeline.dedup.shingles import jaccard


@dataclass(frozen=True)
class Clusters:
    """One entry per input document.

    Attributes:
        number: int64, clusters numbered by their first document.
        twin: int64, the document kept of the cluster; the document itself if it is kept.
        jaccard: float64, similarity with the twin; 1 for itself.
        exact: bool, whether the twin has the same text; false for itself.
    """

    number: NDArray[np.int64]
    twin: NDArray[np.int64]
    jaccard: NDArray[np.float64]
    exact: NDArray[np.bool_]


def find_clusters(
    parts: Sequence[Path],
    ids: pa.Array,
    signatures: Signatures,
    *,
    threshold: float,
    ngram: int,
    workers: int,
) -> Clusters:
    """Join equal texts, then candidate pairs whose true similarity is at least `threshold`."""
    original = _first_with_equal_text(signatures.digests)
    rows = np.arange(len(original))
    sets = UnionFind(len(original))
    for row in np.flatnonzero(original != rows).tolist():
        sets.union(row, int(original[row]))

    originals = rows[original == rows]
    buckets = bucket_documents(originals, signatures.bands.take(pa.array(originals)))
    candidates = sorted({row for bucket in buckets for row in bucket})
    names = ids.take(pa.array(candidates, pa.int64()))
    by_name = shingle_sets(parts, names, ngram=ngram, workers=workers)
    shingles = {row: by_name[name] for row, name in zip(candidates, names.to_pylist(), strict=True)}
    for bucket in buckets:
        _join_similar(bucket, shingles, threshold, sets)

    roots = sets.roots()
    twin = _longest(roots, signatures.lengths.to_numpy())
    return Clusters(
        number=np.unique(roots, return_inverse=True)[1],
        twin=twin,
        jaccard=np.array(
            [
                1.0 if a == b else jaccard(shingles[a], shingles[b])
                for a, b in zip(original.tolist(), original[twin].tolist(), strict=True)
            ]
        ),
        exact=(twin != rows) & (original == original[twin]),
    )


def _first_with_equal_text(digests: pa.Array) -> NDArray[np.int64]:
    """For each document the first one of the same text; a blank text only has itself."""
    original = np.arange(len(digests))
    known = np.flatnonzero(digests.is_valid())
    texts = digests.drop_null().dictionary_encode().indices.to_numpy()
    _, first, inverse = np.unique(texts, return_index=True, return_inverse=True)
    original[known] = known[first[inverse]]
    return original


def _join_similar(
    bucket: Sequence[int],
    shingles: Mapping[int, NDArray[np.uint64]],
    threshold: float,
    sets: UnionFind,
) -> None:
    """Join all similar pairs of a bucket; only rows of different sets are compared."""
    joined: dict[int, list[int]] = {}
    for row in bucket:
        joined.setdefault(sets.find(row), []).append(row)
    apart: list[list[int]] = []
    for rows in joined.values():
        near: list[list[int]] = []
        far: list[list[int]] = []
        for others in apart:
            pairs = product(rows, others)
            similar = any(jaccard(shingles[a], shingles[b]) >= threshold for a, b in pairs)
            (near if similar else far).append(others)
        for others in near:
            sets.union(rows[0], others[0])
        # Growing the longest list keeps a bucket of similar documents linear.
        *short, longest = sorted([rows, *near], key=len)
        longest.extend(chain.from_iterable(short))
        apart = [*far, longest]


def _longest(roots: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each document the longest of its cluster, the first among equals."""
    order = np.lexsort((np.arange(len(roots)), -lengths, roots))
    _, first, inverse = np.unique(roots[order], return_index=True, return_inverse=True)
    twin = np.empty_like(roots)
    twin[order] = order[first[inverse]]
    return twin
