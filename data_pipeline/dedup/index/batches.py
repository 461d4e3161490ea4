"""From signed documents to segments, a bounded number of documents at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dedup.index.columns import Column, ColumnWriter
from data_pipeline.dedup.index.folder import Index
from data_pipeline.dedup.index.segments import BAND, COLUMNS, Segment, Segments
from data_pipeline.dedup.lsh import HALF
from data_pipeline.dedup.signed import DIGEST, SignedDocuments


def write_segments(
    documents: Iterator[SignedDocuments], earlier: Segments, index: Index, limit: int
) -> Iterator[Segment]:
    """Write the documents to segments of about `limit` documents; each one comes when it is whole.

    The shingles go through a file, as which of the documents are the first with their text is
    known only when the segment is full.
    """
    segments = earlier
    while (first := next(documents, None)) is not None:
        folder = index.new("segment")
        folder.mkdir()
        some = [first]
        with ColumnWriter(folder / "all-shingles", np.uint64) as writer:
            writer.append(_drop_shingles(first))
            while sum(map(len, some)) < limit and (more := next(documents, None)) is not None:
                writer.append(_drop_shingles(more))
                some.append(more)
        segment = _write_segment(folder, _joined(some), segments)
        yield segment
        segments = Segments([*segments.all, segment])


def hashed(
    documents: Iterator[SignedDocuments], update: Callable[[bytes], None]
) -> Iterator[SignedDocuments]:
    """The documents as they come; their ids, texts and preferences go to `update`, too."""
    for some in documents:
        row = np.dtype([("id", DIGEST), ("text", DIGEST), ("preference", np.int64)])
        rows = np.empty(len(some), row)
        rows["id"], rows["text"] = some.id_digests, some.text_digests
        rows["preference"] = some.preference
        update(rows.tobytes())
        yield some


def _drop_shingles(documents: SignedDocuments) -> NDArray[np.uint64]:
    shingles, documents.shingles = documents.shingles, np.empty(0, np.uint64)
    return shingles


def _joined(some: Sequence[SignedDocuments]) -> SignedDocuments:
    columns = {
        field.name: np.concatenate([getattr(one, field.name) for one in some], axis=-1)
        for field in fields(SignedDocuments)
    }
    return SignedDocuments(**columns)


def _write_segment(folder: Path, signed: SignedDocuments, earlier: Segments) -> Segment:
    segment = Segment(folder, earlier.documents, len(signed))
    original = _originals(segment, signed, earlier)
    is_original = original == np.arange(segment.first, segment.stop)
    columns: dict[str, NDArray[Any]] = {
        "preference": signed.preference,
        "original": original,
        "id_bytes": signed.id_bytes,
        "id_first": np.concatenate([[0], np.cumsum(signed.id_sizes)]),
    }
    everything = np.arange(len(signed))
    for name, hashes, rows in (
        ("id", signed.id_digests, everything),
        ("text", signed.text_digests, np.flatnonzero(~signed.is_blank)),
    ):
        order = rows[np.argsort(hashes[rows], kind="stable")]
        columns[f"{name}_digests"] = hashes[order]
        columns[f"{name}_documents"] = order
    for name, values in columns.items():
        with ColumnWriter(folder / name, COLUMNS[name]) as writer:
            writer.append(values)
    compared = np.flatnonzero(is_original & signed.has_words).astype(np.uint64)
    for number, band in enumerate(signed.bands):
        keys = band[compared].astype(np.uint64) << HALF | compared
        keys.sort()
        with ColumnWriter(folder / BAND.format(number), np.uint64) as writer:
            writer.append(keys)
    _write_sets(folder, signed.set_sizes, is_original)
    return segment


def _originals(segment: Segment, signed: SignedDocuments, earlier: Segments) -> NDArray[np.int64]:
    """For each document the first one of the same text; a blank text only has itself."""
    numbers = np.arange(segment.first, segment.stop)
    known = np.flatnonzero(~signed.is_blank)
    texts, first, inverse = np.unique(
        signed.text_digests[known], return_index=True, return_inverse=True
    )
    found = earlier.find("text", texts)
    originals = earlier.take("original", found[found >= 0])
    first = numbers[known[first]]
    first[found >= 0] = originals
    result = numbers.copy()
    result[known] = first[inverse]
    return result


def _write_sets(folder: Path, sizes: NDArray[np.int64], is_original: NDArray[np.bool_]) -> None:
    """Keep the shingles of the originals, of those of all documents."""
    whole = folder / "all-shingles"
    column = Column(whole, np.uint64)
    ends = np.cumsum(sizes)
    with ColumnWriter(folder / "shingles", np.uint64) as writer:
        row = 0
        for chunk in column.chunks():
            rows = np.arange(row, row + len(chunk))
            writer.append(chunk[is_original[np.searchsorted(ends, rows, "right")]])
            row += len(chunk)
    whole.unlink()
    left = np.where(is_original, sizes, 0)
    with ColumnWriter(folder / "shingle_first", np.int64) as writer:
        writer.append(np.concatenate([[0], np.cumsum(left)]))
