"""Deduplication of a dump against all earlier ones, none of which is read again."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.dedup.index.batches import hashed, write_segments
from data_pipeline.dedup.index.columns import Column, ColumnWriter
from data_pipeline.dedup.index.folder import Dump, Index, held_index
from data_pipeline.dedup.index.forest import Forest
from data_pipeline.dedup.index.joining import join_documents
from data_pipeline.dedup.index.limits import Limits, limits_of
from data_pipeline.dedup.index.segments import Segment, Segments
from data_pipeline.dedup.index.state import (
    State,
    fresh_documents,
    roots_before,
    write_state,
)
from data_pipeline.dedup.index.tables import (
    changed_documents,
    documents_at,
    documents_of,
    write_tables,
)
from data_pipeline.dedup.inputs import Part
from data_pipeline.dedup.outputs import CLUSTERS, DOCUMENTS, SUPERSEDED, staged_results
from data_pipeline.dedup.run import (
    DedupReport,
    parts_to_compare,
    refuse_inputs_in,
    write_kept,
)
from data_pipeline.dedup.settings import Settings
from data_pipeline.dedup.signed import signed_documents
from data_pipeline.engine import Engine
from data_pipeline.errors import DataError

CLUSTERS_NAMES = ("id", "cluster", "kept", "exact", "twin", "jaccard")
SUPERSEDED_NAMES = ("id", "dump", "cluster", "twin", "jaccard")


@dataclass(frozen=True)
class IndexReport:
    """Counts of the documents of a dump.

    Attributes:
        dump: its number, from 0.
        is_new: false if the index had it already.
        superseded: documents of earlier dumps that were kept before this one came.
    """

    dump: int
    is_new: bool
    documents: int
    kept: int
    exact_duplicates: int
    near_duplicates: int
    superseded: int


def deduplicate_with_index(
    inputs: Sequence[Path],
    out: Path,
    folder: Path,
    settings: Settings,
    *,
    memory: int,
    workers: int = 1,
    engine: Engine | None = None,
) -> IndexReport:
    """Add a dump to an index, and write which of its documents are kept.

    What the index then has of all dumps is what one deduplication of all their files, in the order
    in which they were added, finds. A dump that it has already is not added again, and `out` gets
    what is kept of it now.

    Args:
        inputs, out: as `deduplicate`; `cluster` is the number of the cluster's first document in
            the index. `out` also gets superseded.parquet, a row for each document of an earlier
            dump that was kept before: id, dump, cluster, twin, jaccard.
        folder: of the index, made if there is none.
        memory: bytes for what is held at a time, on top of the program itself.
        engine: signs the inputs, as `deduplicate` says.

    Raises:
        DataError: as `deduplicate`; the index has other settings or is damaged, an id stands twice
            or is that of an earlier document, or another process holds the index. Index and `out`
            keep what they had.
    """
    limits = limits_of(memory)
    refuse_inputs_in(out, inputs)
    if out.resolve() == folder.resolve():
        raise DataError(f"{out}: is the folder of the index; name another --out")
    with held_index(folder, settings) as index, staged_results(out) as scratch:
        parts = parts_to_compare(inputs, scratch, settings, None, engine)
        return _add_parts(index, parts, scratch, limits, workers, engine)


def deduplicate_within(
    memory: int,
    inputs: Sequence[Path],
    out: Path,
    settings: Settings,
    workers: int,
    signed: Sequence[Path] | None,
    engine: Engine | None,
) -> DedupReport:
    """`deduplicate` by an index that is made for this alone, and removed."""
    limits = limits_of(memory)
    with staged_results(out) as scratch, held_index(scratch / "index", settings) as index:
        parts = parts_to_compare(inputs, scratch, settings, signed, engine)
        report = _add_parts(index, parts, scratch, limits, workers, engine)
        (scratch / SUPERSEDED).unlink()
        is_joined = np.zeros(report.documents, np.bool_)
        for first, rows in index.state.rows(0, report.documents):
            numbers = np.arange(first, first + len(rows["root"]))
            is_joined[rows["root"][rows["root"] != numbers]] = True
    return DedupReport(
        documents=report.documents,
        kept=report.kept,
        exact_duplicates=report.exact_duplicates,
        near_duplicates=report.near_duplicates,
        clusters=int(is_joined.sum()),
    )


def _add_parts(
    index: Index,
    parts: Sequence[Part],
    scratch: Path,
    limits: Limits,
    workers: int,
    engine: Engine | None,
) -> IndexReport:
    number, is_new = _add(index, parts, limits, workers)
    return _write_results(index, parts, scratch, number, is_new, workers, engine)


def _add(index: Index, parts: Sequence[Part], limits: Limits, workers: int) -> tuple[int, bool]:
    """The number of the dump, and whether the index did not have it."""
    earlier, before = index.segments, index.state
    digest = hashlib.blake2b(digest_size=16)
    documents = hashed(signed_documents(parts, index.contents.settings, workers), digest.update)
    added = list(write_segments(documents, earlier, index, limits.documents))
    dumps = index.contents.dumps
    for number, dump in enumerate(dumps):
        if dump.digest == digest.hexdigest():
            return number, False
    segments, state = earlier, before
    for segment in added:
        _refuse_known_ids(segment, segments, dumps)
        segments = Segments([*segments.all, segment])
        state, last = _join(index, segments, state, segment, limits), state
        if last is not before:
            shutil.rmtree(last.folder)
    superseded = index.new("dump")
    with ColumnWriter(superseded, np.int64) as writer:
        for numbers in changed_documents(before, state, earlier.documents):
            writer.append(numbers)
    dump = Dump(earlier.documents, segments.documents, digest.hexdigest(), superseded.name)
    index.commit(segments, state, (*dumps, dump))
    return len(dumps), True


def _refuse_known_ids(segment: Segment, earlier: Segments, dumps: Sequence[Dump]) -> None:
    digests = segment.column("id_digests").read(0, segment.documents)
    is_second = np.flatnonzero(digests[1:] == digests[:-1]) + 1
    known = np.flatnonzero(earlier.find("id", np.unique(digests)) >= 0)
    if not len(is_second) and not len(known):
        return
    wanted = digests[is_second[0]] if len(is_second) else np.unique(digests)[known[0]]
    rows = segment.column("id_documents").take(np.flatnonzero(digests == wanted))
    name = Segments([segment]).ids(segment.first + rows.astype(np.int64))[0].as_py()
    starts = [dump.first for dump in dumps]
    if len(known) and (first := int(earlier.find("id", np.array([wanted]))[0])) < (
        dumps[-1].stop if dumps else 0
    ):
        number = int(np.searchsorted(starts, first, "right")) - 1
        raise DataError(
            f"id `{name}` is one of dump {number} of the index already, with another text or in "
            "other company; make ids unique over all dumps"
        )
    raise DataError(f"id `{name}` stands twice in the inputs; make ids unique")


def _join(
    index: Index, segments: Segments, before: State, segment: Segment, limits: Limits
) -> State:
    """The state with the documents of the last segment."""
    settings = index.contents.settings
    fresh = fresh_documents(segments, before, np.arange(segment.first, segment.stop))
    forest = Forest(np.unique(fresh.roots))
    join_documents(
        segments,
        fresh.documents[fresh.roots == fresh.documents],
        [np.empty(0, np.uint32)] * settings.bands,
        lambda documents: roots_before(before, fresh, documents),
        forest,
        threshold=settings.threshold or 1.0,
        limits=limits,
    )
    none = np.empty(0, np.int64)
    return write_state(index.new("state"), segments, before, fresh, forest, none, limits.shingles)


def _write_results(
    index: Index,
    parts: Sequence[Part],
    scratch: Path,
    number: int,
    is_new: bool,
    workers: int,
    engine: Engine | None,
) -> IndexReport:
    dumps = index.contents.dumps
    dump = dumps[number]
    documents = sum(part.rows for part in parts)
    is_kept = np.zeros(documents, np.bool_)
    counts: Counter[str] = Counter()

    def counted() -> Iterator[pa.Table]:
        for table in documents_of(index.segments, index.state, dumps, dump.first, dump.stop):
            kept, exact = (table[name].to_numpy() for name in ("kept", "exact"))
            counts.update(
                kept=int(kept.sum()),
                exact=int(exact.sum()),
                near=int((~kept & ~exact).sum()),
            )
            yield table

    write_tables(scratch / CLUSTERS, counted(), CLUSTERS_NAMES)
    for first, rows in index.state.rows(dump.first, dump.stop):
        numbers = np.arange(first, first + len(rows["twin"]))
        is_kept[numbers - dump.first] = rows["twin"] == numbers
    write_kept(parts, is_kept, None, scratch / DOCUMENTS, workers, engine)
    superseded = write_tables(scratch / SUPERSEDED, _superseded(index, dump), SUPERSEDED_NAMES)
    return IndexReport(
        dump=number,
        is_new=is_new,
        documents=documents,
        kept=counts["kept"],
        exact_duplicates=counts["exact"],
        near_duplicates=counts["near"],
        superseded=superseded,
    )


def _superseded(index: Index, dump: Dump) -> Iterator[pa.Table]:
    """The documents that the dump has superseded, and no removal has brought back."""
    for numbers in Column(index.folder / dump.superseded, np.int64).chunks():
        table = documents_at(index.segments, index.state, index.contents.dumps, numbers)
        yield table.filter(pc.invert(table["kept"]))
