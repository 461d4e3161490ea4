"""Exact and near-duplicate removal, from files of documents to files of documents."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.dedup.batches import read_batches
from data_pipeline.dedup.clusters import Clusters, find_clusters
from data_pipeline.dedup.inputs import Part, parquet_parts, read_ids, without_views
from data_pipeline.dedup.outputs import CLUSTERS, DOCUMENTS, staged_results
from data_pipeline.dedup.repeated_units import RepeatedUnits, has_words
from data_pipeline.dedup.settings import (
    Exact,
    Keep,
    Settings,
    check_choice,
    check_settings,
    checked_settings,
)
from data_pipeline.dedup.signatures import sign_documents
from data_pipeline.dedup.signed import sign_parts
from data_pipeline.dedup.timestamps import require_timestamps
from data_pipeline.engine import Engine
from data_pipeline.errors import DataError


@dataclass(frozen=True)
class DedupReport:
    """Counts of documents, the duplicates by whether the one kept has the very same text.

    `clusters` counts those of two or more documents, `removed_units` the repeated paragraphs or
    lines, and `emptied` the documents that had nothing else, which are dropped, too.
    """

    documents: int
    kept: int
    exact_duplicates: int
    near_duplicates: int
    clusters: int
    removed_units: int = 0
    emptied: int = 0


def deduplicate(
    inputs: Sequence[Path],
    out: Path,
    *,
    threshold: float | None = 0.8,
    bands: int | None = None,
    rows: int | None = None,
    ngram: int = 5,
    exact: Exact = "document",
    keep: Keep = "longest",
    workers: int = 1,
    memory: int | None = None,
    signed: Sequence[Path] | None = None,
    engine: Engine | None = None,
) -> DedupReport:
    r"""Keep one document of every cluster of duplicates.

    Two documents are duplicates if their texts are equal, or if they share a MinHash band and the
    Jaccard similarity of their sets of word n-grams is at least `threshold`. Clusters are the
    connected components; blank texts match nothing. The result does not depend on `workers`.

    Args:
        inputs: Parquet or JSONL(.gz, .zst) with unique string `id` and `text`. Other columns of
            Parquet are carried along; other fields of JSONL become one column `extra`, a JSON
            object of the fields as they were written, or null.
        out: gets documents/*.parquet, in input order, and clusters.parquet, a row per input
            document: id, cluster (the number of its first document), kept, exact (dropped, and
            nothing of its text is lost), twin (the document kept of its cluster), jaccard (with
            its twin), both null if it is that document itself; and removed_units, unless `exact`
            is "document".
        threshold: None removes exact duplicates alone.
        bands: of the MinHash signature, with `rows` values each; both or neither. By default 14 of
            8, as in FineWeb; below 0.79 such that a pair exactly at `threshold` is found in 95 of
            100 cases.
        ngram: words of a shingle. Words are lower-cased runs of `\w`; a shorter text is one
            shingle.
        exact: with "paragraph" (separated by an empty line) or "line", those that an earlier kept
            document has, or the same one before, are removed from the kept documents; a document
            that loses every word so is dropped.
        keep: the "longest" document of a cluster, the "newest" by the column `timestamp`, or the
            "first"; the first among equals. `timestamp` is of that type or a string as
            2024-03-01T00:00:00Z.
        workers: threads that hash the texts.
        memory: bytes for what is held at a time, on top of the program itself, or None for all of
            it, about 0.4 kB of each document. The rest is in files meanwhile; the outcome is equal.
        signed: files of the signed documents of each of the inputs, which are Parquet then, with
            the same settings (`dedup.signed`). Their texts are read only to be written.
        engine: signs the inputs, unless they are, and writes what is kept of each, in tasks; by
            default threads of this process do. One of `exact` but "document" is written by one.

    Raises:
        DataError: a setting or a file is wrong; `out` keeps what it had.
    """
    settings = checked_settings(threshold, bands, rows, ngram, keep)
    check_settings(threshold, workers=workers)
    check_choice("exact", exact, Exact)
    check_memory(memory, exact)
    refuse_inputs_in(out, inputs)
    if memory is not None:
        from data_pipeline.dedup.index import deduplicate_within

        return deduplicate_within(memory, inputs, out, settings, workers, signed, engine)
    with staged_results(out) as scratch:
        parts = parts_to_compare(inputs, scratch, settings, signed, engine)
        ids = read_ids(parts)
        signatures = sign_documents(parts, settings, workers)
        clusters = find_clusters(
            parts,
            signatures,
            scratch / "shingles",
            threshold=threshold or 1.0,
            ngram=ngram,
            workers=workers,
        )
        is_best = clusters.twin == np.arange(len(clusters.twin))
        units = None if exact == "document" else RepeatedUnits(exact)
        kept, removed = write_kept(parts, is_best, units, scratch / DOCUMENTS, workers, engine)
        table = _table(ids, clusters, kept)
        if units is not None:
            table = table.append_column("removed_units", pa.array(removed))
        pq.write_table(table, scratch / CLUSTERS)
    return DedupReport(
        documents=len(kept),
        kept=int(kept.sum()),
        exact_duplicates=int(clusters.exact.sum()),
        near_duplicates=int((~is_best & ~clusters.exact).sum()),
        clusters=int((np.bincount(clusters.number) > 1).sum()),
        removed_units=int(removed.sum()),
        emptied=int((is_best & ~kept).sum()),
    )


def check_memory(memory: int | None, exact: Exact) -> None:
    """Raises DataError if deduplication cannot keep within so many bytes."""
    if memory is None:
        return
    if exact != "document":
        raise DataError(
            f"exact={exact} is not allowed with a memory, which bounds what is held of whole texts "
            "alone: leave it out, or deduplicate what is kept once more without it"
        )
    # Indices are made of what is here.
    from data_pipeline.dedup.index.limits import limits_of

    limits_of(memory)


def parts_to_compare(
    inputs: Sequence[Path],
    scratch: Path,
    settings: Settings,
    signed: Sequence[Path] | None,
    engine: Engine | None,
) -> list[Part]:
    """The documents of the inputs, signed ones if they are or an engine is asked to sign them."""
    parts = parquet_parts(inputs, scratch)
    if settings.keep == "newest":
        require_timestamps(parts)
    if signed is not None:
        return [replace(part, signed=file) for part, file in zip(parts, signed, strict=True)]
    if engine is not None:
        return sign_parts(parts, scratch / "signed", settings, engine)
    return parts


def refuse_inputs_in(out: Path, inputs: Sequence[Path]) -> None:
    folder = out / DOCUMENTS
    for path in inputs:
        if folder.resolve() in path.resolve().parents:
            raise DataError(f"{path}: lies in {folder}, which will be replaced; name another --out")


def write_kept(
    parts: Sequence[Part],
    is_best: NDArray[np.bool_],
    units: RepeatedUnits | None,
    folder: Path,
    workers: int,
    engine: Engine | None,
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Write the best documents with all their columns, one file per part.

    Args:
        engine: writes whole documents, a task per part.

    Returns:
        Which documents were written, and how many units each one lost.
    """
    folder.mkdir()
    kept = is_best.copy()
    removed = np.zeros(len(is_best), np.int64)
    first_rows = np.cumsum([0, *(part.rows for part in parts)]).tolist()
    files = [folder / f"part-{number:05d}.parquet" for number in range(len(parts))]
    if engine is not None and units is None:
        flags = [np.packbits(is_best[a:b]).tobytes() for a, b in pairwise(first_rows)]
        tasks = list(zip(parts, flags, files, strict=True))
        for _ in engine.do_each(write_flagged, tasks, folder.parent):
            pass
        return kept, removed

    def write_part(number: int) -> None:
        schema = without_views(pq.read_schema(parts[number].path))
        with pq.ParquetWriter(files[number], schema) as writer:
            for batch in read_batches([parts[number]]):
                start = first_rows[number] + batch.row
                rows = start + np.flatnonzero(is_best[start : start + len(batch.records)])
                records = batch.records.take(pa.array(rows - start))
                if units is not None:
                    records, removed[rows], kept[rows] = _without_repeated(records, units)
                if len(records):
                    writer.write_batch(records)

    # Which unit is the first of its kind is known only in order.
    with ThreadPoolExecutor(workers if units is None else 1) as pool:
        for _ in pool.map(write_part, range(len(parts))):
            pass
    return kept, removed


def write_flagged(part: Part, flags: bytes, file: Path) -> None:
    """Write the documents of a part whose bit is set; of two at a time, the last one's file stays.

    Meanwhile it lies beside the folder that it belongs to.
    """
    is_kept = np.unpackbits(np.frombuffer(flags, np.uint8), count=part.rows).astype(np.bool_)
    aside = file.parents[1] / uuid4().hex
    with pq.ParquetWriter(aside, without_views(pq.read_schema(part.path))) as writer:
        for batch in read_batches([part]):
            flagged = is_kept[batch.row : batch.row + len(batch.records)]
            if flagged.any():
                writer.write_batch(batch.records.filter(pa.array(flagged)))
    aside.rename(file)


def _without_repeated(
    records: pa.RecordBatch, units: RepeatedUnits
) -> tuple[pa.RecordBatch, NDArray[np.int64], NDArray[np.bool_]]:
    """The documents that keep some words; of each one the units removed and whether it stays."""
    place = records.schema.get_field_index("text")
    field = records.schema.field(place)
    texts, removed = units.remove(records["text"].to_pylist())
    stays = [not lost or has_words(text) for text, lost in zip(texts, removed, strict=True)]
    changed = records.set_column(place, field, pa.array(texts, field.type))
    return changed.filter(pa.array(stays, pa.bool_())), np.array(removed), np.array(stays, np.bool_)


def _table(ids: pa.Array, clusters: Clusters, kept: NDArray[np.bool_]) -> pa.Table:
    is_best = clusters.twin == np.arange(len(kept))
    return pa.table(
        {
            "id": ids,
            "cluster": clusters.number,
            "kept": kept,
            # What is left of an emptied document stands in others word for word.
            "exact": clusters.exact | (is_best & ~kept),
            "twin": pc.if_else(is_best, None, ids.take(pa.array(clusters.twin))),
            "jaccard": pa.array(clusters.jaccard, mask=is_best),
        }
    )
