"""Removal of documents from an index, as if they had never been added."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.dedup.index.folder import held_index, sync
from data_pipeline.dedup.index.forest import Forest, contains
from data_pipeline.dedup.index.joining import Bands, hashes_of, join_documents
from data_pipeline.dedup.index.limits import limits_of
from data_pipeline.dedup.index.rewriting import Moves, rewrite_segment
from data_pipeline.dedup.index.segments import Segments
from data_pipeline.dedup.index.state import State, fresh_documents, roots_before, write_state
from data_pipeline.dedup.index.tables import SCHEMA, changed_documents, documents_at, write_tables
from data_pipeline.dedup.signatures import digests
from data_pipeline.dedup.signed import DIGEST
from data_pipeline.errors import DataError


@dataclass(frozen=True)
class RemovalReport:
    """How many documents were removed, and for how many others that decides whether they stay."""

    removed: int
    changed: int


def remove_documents(
    folder: Path, ids: Sequence[str], changes: Path, *, memory: int
) -> RemovalReport:
    """Remove documents; what is left is what one deduplication without them finds.

    Their clusters may fall apart: what is left of these is compared again, and also the buckets of
    more documents than are compared, as others are now among the first. All columns that hold
    something of a removed document are written anew.

    Args:
        changes: a Parquet file to write, a row for each document that is kept now and was not, or
            the reverse: id, dump, cluster, kept, exact, twin, jaccard.
        memory: bytes for what is held at a time, on top of the program itself, the members of the
            clusters that are concerned, and the ids.

    Raises:
        DataError: the index has no document of an id, it is damaged, another process holds it, or
            `changes` cannot be written; it keeps what it had.
    """
    limits = limits_of(memory)
    if changes.is_dir():
        raise DataError(f"{changes}: is a folder; name the file to write")
    with held_index(folder) as index:
        segments, before, settings = index.segments, index.state, index.contents.settings
        removed = _numbers(segments, ids)
        members = _cluster_members(before, removed)
        moves = _moves(segments, removed, members)
        touched = np.union1d(removed[segments.take("original", removed) == removed], moves.sources)
        changed: Bands = [hashes_of(segments, band, touched) for band in range(settings.bands)]
        left = Segments(
            [rewrite_segment(segment, segments, moves, settings.bands, index)
             for segment in segments.all]
        )  # fmt: skip
        fresh = fresh_documents(left, before, members[~contains(removed, members)])
        forest = Forest(np.unique(fresh.roots))
        join_documents(
            left,
            fresh.documents[fresh.roots == fresh.documents],
            changed,
            lambda documents: roots_before(before, fresh, documents),
            forest,
            threshold=settings.threshold or 1.0,
            limits=limits,
        )
        state = write_state(
            index.new("state"), left, before, fresh, forest, removed, limits.shingles
        )
        dumps = index.contents.dumps
        changed_now = changed_documents(before, state, left.documents)
        tables = (documents_at(left, state, dumps, numbers) for numbers in changed_now)
        aside = changes.with_name(f".{changes.name}")
        count = write_tables(aside, tables, SCHEMA.names)
        # First: a removal that is killed behind this is repeated, one that is done cannot be.
        sync([aside])
        aside.replace(changes)
        index.commit(left, state, dumps)
    return RemovalReport(removed=len(removed), changed=count)


def _numbers(segments: Segments, ids: Sequence[str]) -> NDArray[np.int64]:
    """The sorted numbers of the documents of the ids."""
    names = pa.array(ids, pa.large_string()).unique()
    hashes = digests(names).reshape(-1).view(DIGEST)
    order = np.argsort(hashes)
    found = segments.find("id", hashes[order])
    missing = np.flatnonzero(found < 0)
    if len(missing):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(
            f"id `{names[int(order[missing[0]])].as_py()}`{more}: the index has no such document; "
            "nothing was removed"
        )
    return np.sort(found)


def _cluster_members(state: State, documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """All documents of the clusters of some."""
    column = state.column("root")
    roots = np.unique(column.take(documents))
    found = [np.empty(0, np.int64)]
    row = 0
    for chunk in column.chunks():
        found.append(row + np.flatnonzero(contains(roots, chunk)))
        row += len(chunk)
    return np.concatenate(found)


def _moves(segments: Segments, removed: NDArray[np.int64], members: NDArray[np.int64]) -> Moves:
    """Texts whose first document is removed go to the next one that has them."""
    left = members[~contains(removed, members)]
    original = segments.take("original", left)
    orphaned = contains(removed, original)
    sources, first = np.unique(original[orphaned], return_index=True)
    copies = left[orphaned]
    targets = copies[first]
    new_original = targets[np.searchsorted(sources, original[orphaned])]
    return Moves(removed, sources, targets, copies, new_original)
