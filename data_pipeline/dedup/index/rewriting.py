"""A segment without some of its documents; the others keep their numbers."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dedup.index.columns import ColumnWriter
from data_pipeline.dedup.index.folder import Index
from data_pipeline.dedup.index.forest import contains
from data_pipeline.dedup.index.segments import BAND, COLUMNS, Segment, Segments
from data_pipeline.dedup.lsh import HALF, LOW_HALF


@dataclass(frozen=True)
class Moves:
    """What changes of documents.

    Attributes:
        removed: sorted.
        sources: sorted; those of them that were the first with a text that others have, too.
        targets: of each source the next document with its text, which gets its bands and shingles.
        copies: sorted; all other documents with these texts.
        originals: of each copy the target.
    """

    removed: NDArray[np.int64]
    sources: NDArray[np.int64]
    targets: NDArray[np.int64]
    copies: NDArray[np.int64]
    originals: NDArray[np.int64]


def rewrite_segment(
    segment: Segment, segments: Segments, moves: Moves, bands: int, index: Index
) -> Segment:
    """The segment after the moves, itself if none concerns it."""
    concerned = np.concatenate([moves.removed, moves.copies])
    if not ((concerned >= segment.first) & (concerned < segment.stop)).any():
        return segment
    new = Segment(index.new("segment"), segment.first, segment.documents)
    new.folder.mkdir()
    removed = _rows(segment, moves.removed)
    is_here = (moves.targets >= segment.first) & (moves.targets < segment.stop)
    sources, targets = moves.sources[is_here], moves.targets[is_here] - segment.first
    order = np.argsort(targets)
    sources, targets = sources[order], targets[order]
    _rewrite_columns(segment, new, moves, removed)
    for name in ("id", "text"):
        _rewrite_table(segment, new, name, removed)
    for band in range(bands):
        _rewrite_band(segment, new, segments, band, removed, sources, targets)
    nothing = np.empty(0, np.uint64)
    own = {int(row): nothing for row in removed}
    _rewrite_lists(segment, new, "id_first", "id_bytes", dict.fromkeys(own, np.empty(0, np.uint8)))
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        own[target] = segments.sets(np.array([source]))[0]
    _rewrite_lists(segment, new, "shingle_first", "shingles", own)
    return new


def _rows(segment: Segment, documents: NDArray[np.int64]) -> NDArray[np.int64]:
    is_here = (documents >= segment.first) & (documents < segment.stop)
    return documents[is_here] - segment.first


def _write(folder_segment: Segment, name: str, values: NDArray[Any], kind: Any) -> None:
    with ColumnWriter(folder_segment.folder / name, kind) as writer:
        writer.append(values)


def _rewrite_columns(
    segment: Segment, new: Segment, moves: Moves, removed: NDArray[np.int64]
) -> None:
    original = segment.column("original").read(0, segment.documents)
    is_here = (moves.copies >= segment.first) & (moves.copies < segment.stop)
    original[moves.copies[is_here] - segment.first] = moves.originals[is_here]
    preference = segment.column("preference").read(0, segment.documents)
    preference[removed] = 0
    _write(new, "original", original, COLUMNS["original"])
    _write(new, "preference", preference, COLUMNS["preference"])


def _rewrite_table(segment: Segment, new: Segment, table: str, removed: NDArray[np.int64]) -> None:
    documents = segment.column(f"{table}_documents")
    rows = documents.read(0, len(documents))
    stays = ~contains(removed, rows.astype(np.int64))
    hashes = segment.column(f"{table}_digests").read(0, len(rows))
    for name, values in ((f"{table}_documents", rows), (f"{table}_digests", hashes)):
        _write(new, name, values[stays], COLUMNS[name])


def _rewrite_band(
    segment: Segment,
    new: Segment,
    segments: Segments,
    band: int,
    removed: NDArray[np.int64],
    sources: NDArray[np.int64],
    targets: NDArray[np.int64],
) -> None:
    column = segment.band(band)
    rows = column.read(0, len(column))
    keys = [rows[~contains(removed, (rows & LOW_HALF).astype(np.int64))]]
    for owner, places in segments.with_documents(sources):
        wanted = np.full(owner.documents, -1, np.int64)
        wanted[sources[places] - owner.first] = targets[places]
        for some in owner.band(band).chunks():
            target = wanted[some & LOW_HALF]
            found = target >= 0
            keys.append(some[found] >> HALF << HALF | target[found].astype(np.uint64))
    _write(new, BAND.format(band), np.sort(np.concatenate(keys)), np.uint64)


def _rewrite_lists(
    segment: Segment, new: Segment, first: str, values: str, own: dict[int, NDArray[Any]]
) -> None:
    """Write the list of values of each document anew, where `own` has others."""
    bounds = segment.column(first).read(0, segment.documents + 1)
    column = segment.column(values)
    sizes = np.diff(bounds)
    with ColumnWriter(new.folder / values, COLUMNS[values]) as writer:
        row = 0
        for changed in [*sorted(own), segment.documents]:
            for chunk in column.chunks(int(bounds[row]), int(bounds[changed])):
                writer.append(chunk)
            if changed < segment.documents:
                writer.append(own[changed])
                sizes[changed] = len(own[changed])
            row = changed + 1
    _write(new, first, np.concatenate([[0], np.cumsum(sizes)]), COLUMNS[first])
