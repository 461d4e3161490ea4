"""Clusters of duplicates, from signatures to the document that survives each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dedup.inputs import Part
from data_pipeline.dedup.lsh import Buckets, share_band
from data_pipeline.dedup.shingle_file import ShingleFile
from data_pipeline.dedup.signatures import Signatures
from data_pipeline.dedup.signed import DIGEST

# Documents of one bucket are compared with the first ones only, lest a million pages of one
# template, alike but for less than the threshold, take a million comparisons each.
MOST_COMPARISONS = 256
# Shingles that are in memory at a time.
SHINGLES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Clusters:
    """One entry per input document.

    Attributes:
        number: int64, the first document of the cluster.
        twin: int64, the document kept of the cluster; the document itself if it is kept.
        jaccard: float64, similarity with the twin; 1 for itself.
        exact: bool, whether the twin has the same text; false for itself.
    """

    number: NDArray[np.int64]
    twin: NDArray[np.int64]
    jaccard: NDArray[np.float64]
    exact: NDArray[np.bool_]


def find_clusters(
    parts: Sequence[Part],
    signatures: Signatures,
    scratch: Path,
    *,
    threshold: float,
    ngram: int,
    workers: int,
) -> Clusters:
    """Join equal texts, then candidate pairs whose true similarity is at least `threshold`.

    The shingles of candidates lie in the file `scratch` meanwhile.
    """
    original = _first_with_equal_text(signatures)
    rows = np.arange(len(original))
    compared = rows[(original == rows) & signatures.has_words]
    candidates = _candidates(signatures.bands, compared)
    shingles = ShingleFile(scratch, parts, candidates, ngram=ngram, workers=workers)
    parent = original.copy()
    for band in signatures.bands:
        join_buckets(share_band(band, compared), shingles, threshold, parent)
    scratch.unlink()

    twin = _preferred(parent, signatures.preference)
    return Clusters(
        number=parent,
        twin=twin,
        jaccard=_similarities(shingles, original, original[twin]),
        exact=(twin != rows) & (original == original[twin]),
    )


def _first_with_equal_text(signatures: Signatures) -> NDArray[np.int64]:
    """For each document the first one of the same text; a blank text only has itself."""
    original = np.arange(len(signatures.digests))
    known = np.flatnonzero(~signatures.is_blank)
    texts = signatures.digests[known].reshape(-1).view(DIGEST)
    _, first, inverse = np.unique(texts, return_index=True, return_inverse=True)
    original[known] = known[first[inverse]]
    return original


def _candidates(bands: NDArray[np.uint32], compared: NDArray[np.int64]) -> NDArray[np.int64]:
    """The documents that share a band with another one."""
    is_candidate = np.zeros(bands.shape[1], np.bool_)
    for band in bands:
        is_candidate[share_band(band, compared).documents] = True
    return np.flatnonzero(is_candidate)


def join_buckets(
    buckets: Buckets, shingles: ShingleFile, threshold: float, parent: NDArray[np.int64]
) -> int:
    """Join the similar documents of each bucket in the forest `parent`, see `set_kernels`.

    Returns:
        How many pairs were compared.
    """
    from data_pipeline.dedup.set_kernels import flatten, join_similar

    compared = 0
    sizes = shingles.sizes(shingles.sets_of(buckets.documents))
    for some in buckets.split(sizes, SHINGLES_AT_ONCE):
        compared += join_similar(
            some.documents,
            shingles.sets_of(some.documents),
            np.ones(len(some.documents), np.bool_),
            some.starts,
            parent,
            shingles.hashes,
            shingles.first,
            threshold,
            MOST_COMPARISONS,
        )
        shingles.forget()
    flatten(parent)
    return compared


def _preferred(roots: NDArray[np.int64], preference: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each document the one preferred of its cluster, the first among equals."""
    order = np.lexsort((-preference, roots))  # stable
    _, first, inverse = np.unique(roots[order], return_index=True, return_inverse=True)
    twin = np.empty_like(roots)
    twin[order] = order[first[inverse]]
    return twin


def _similarities(
    shingles: ShingleFile, left: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The similarity of each pair of documents, which are equal or candidates."""
    from data_pipeline.dedup.set_kernels import jaccards

    similarities = np.ones(len(left))
    pairs = np.flatnonzero(left != right)
    for some in _chunks(pairs, shingles.sizes(shingles.sets_of(left[pairs]))):
        a, b = (shingles.sets_of(documents[some]) for documents in (left, right))
        similarities[some] = jaccards(shingles.hashes, shingles.first, a, b)
        shingles.forget()
    return similarities


def _chunks(items: NDArray[np.int64], sizes: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """The items in pieces of at most about SHINGLES_AT_ONCE."""
    cuts = np.flatnonzero(np.diff(np.cumsum(sizes) // SHINGLES_AT_ONCE)) + 1
    yield from np.split(items, cuts)
