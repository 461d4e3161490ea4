"""Exact and near-duplicate removal, from files of documents to files of documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from daft.exceptions import DaftCoreException
from numpy.typing import NDArray

from data_pipeline.dedup.clusters import Clusters, find_clusters
from data_pipeline.dedup.inputs import (
    Part,
    parquet_parts,
    read_batches,
    read_ids,
    refuse_damage,
    refuse_null,
)
from data_pipeline.dedup.lsh import sign
from data_pipeline.dedup.minhash import candidate_probability, choose_bands
from data_pipeline.dedup.outputs import CLUSTERS, DOCUMENTS, staged_results
from data_pipeline.errors import DataError

LOWEST_RECALL = 0.5


@dataclass(frozen=True)
class DedupReport:
    """Counts of documents, the duplicates by whether the one kept has the very same text.

    `clusters` counts those of two or more documents.
    """

    documents: int
    kept: int
    exact_duplicates: int
    near_duplicates: int
    clusters: int


def deduplicate(
    inputs: Sequence[Path],
    out: Path,
    *,
    threshold: float = 0.8,
    bands: int | None = None,
    rows: int | None = None,
    ngram: int = 5,
    workers: int = 1,
) -> DedupReport:
    r"""Keep the longest document of every cluster of duplicates, the first among equals.

    Two documents are duplicates if their texts are equal, or if they share a MinHash band and the
    Jaccard similarity of their sets of word n-grams is at least `threshold`. Clusters are the
    connected components; blank texts match nothing. The result does not depend on `workers`.

    Args:
        inputs: Parquet or JSONL(.gz, .zst) with unique string `id` and `text`. Other columns of
            Parquet are carried along; other fields of JSONL become one column `extra`, a JSON
            object of the fields as they were written, or null.
        out: gets documents/*.parquet, in input order, and clusters.parquet, a row per input
            document: id, cluster, kept, exact (dropped for a twin of the very same text), twin
            (the kept document of its cluster) and jaccard (with its twin), both null if it is kept
            itself.
        bands: of the MinHash signature, with `rows` values each; both or neither. By default they
            follow from `threshold`, such that a pair exactly there is found in 95 of 100 cases.
        ngram: words of a shingle. Words are lower-cased runs of `\w`; a shorter text is one
            shingle.
        workers: processes that hash the texts.

    Raises:
        DataError: a setting or a file is wrong; `out` keeps what it had.
    """
    _check_settings(threshold, ngram=ngram, workers=workers)
    bands, rows = _checked_bands(threshold, bands, rows)
    folder = out / DOCUMENTS
    for path in inputs:
        if folder.resolve() in path.resolve().parents:
            raise DataError(f"{path}: lies in {folder}, which will be replaced; name another --out")
    with staged_results(out) as scratch:
        parts = parquet_parts(inputs, scratch)
        files = [part.path for part in parts if part.rows]
        ids = read_ids(parts)
        try:
            signatures = sign(files, ids, bands=bands, rows=rows, ngram=ngram, workers=workers)
        except DaftCoreException:
            refuse_damage(parts)
            raise
        if signatures.lengths.null_count:
            refuse_damage(parts)  # of which Daft makes nulls, too
            refuse_null(parts, "text", signatures.lengths)
        clusters = find_clusters(
            files, ids, signatures, threshold=threshold, ngram=ngram, workers=workers
        )
        kept = clusters.twin == np.arange(len(clusters.twin))
        _write_kept(parts, kept, scratch / DOCUMENTS)
        pq.write_table(_table(ids, clusters, kept), scratch / CLUSTERS)
    return DedupReport(
        documents=len(kept),
        kept=int(kept.sum()),
        exact_duplicates=int(clusters.exact.sum()),
        near_duplicates=int((~kept & ~clusters.exact).sum()),
        clusters=int((np.bincount(clusters.number) > 1).sum()),
    )


def _check_settings(threshold: float, **counts: int) -> None:
    if not 0 < threshold <= 1:
        raise DataError(f"threshold={threshold} is not allowed: it is above 0 and at most 1")
    for name, count in counts.items():
        if count < 1:
            raise DataError(f"{name}={count} is not allowed: it is at least 1")


def _checked_bands(threshold: float, bands: int | None, rows: int | None) -> tuple[int, int]:
    if bands is None and rows is None:
        return choose_bands(threshold)
    if bands is None or rows is None:
        raise DataError(f"bands={bands} with rows={rows} is not allowed: give both or neither")
    _check_settings(threshold, bands=bands, rows=rows)
    found = candidate_probability(threshold, bands, rows)
    if found < LOWEST_RECALL:
        better = "bands={}, rows={}".format(*choose_bands(threshold))
        raise DataError(
            f"bands={bands}, rows={rows} would miss {1 - found:.0%} of the pairs at "
            f"threshold={threshold}; {better} would do"
        )
    return bands, rows


def _write_kept(parts: Sequence[Part], kept: NDArray[np.bool_], folder: Path) -> None:
    """Write the kept documents with all their columns, one file per part."""
    folder.mkdir()
    row = 0
    for number, part in enumerate(parts):
        schema = pq.read_schema(part.path)
        with pq.ParquetWriter(folder / f"part-{number:05d}.parquet", schema) as writer:
            for batch in read_batches(part):
                writer.write_batch(batch.filter(pa.array(kept[row : row + len(batch)])))
                row += len(batch)


def _table(ids: pa.Array, clusters: Clusters, kept: NDArray[np.bool_]) -> pa.Table:
    return pa.table(
        {
            "id": ids,
            "cluster": clusters.number,
            "kept": kept,
            "exact": clusters.exact,
            "twin": pc.if_else(kept, None, ids.take(pa.array(clusters.twin))),
            "jaccard": pa.array(clusters.jaccard, mask=kept),
        }
    )
