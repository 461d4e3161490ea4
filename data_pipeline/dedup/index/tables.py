"""What became of documents, as tables: of a dump, of what it changed, or of all."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.dedup.index.folder import Dump, held_index
from data_pipeline.dedup.index.segments import Segments
from data_pipeline.dedup.index.state import GONE, STATE, State

SCHEMA = pa.schema(
    {
        "id": pa.large_string(),
        "dump": pa.int64(),
        "cluster": pa.int64(),
        "kept": pa.bool_(),
        "exact": pa.bool_(),
        "twin": pa.large_string(),
        "jaccard": pa.float64(),
    }
)


def documents_of(
    segments: Segments, state: State, dumps: Sequence[Dump], start: int, stop: int
) -> Iterator[pa.Table]:
    """The rows of SCHEMA of the documents that are left of those from `start` on, before `stop`."""
    for first, rows in state.rows(start, stop):
        places = np.flatnonzero(rows["root"] != GONE)
        yield _table(segments, dumps, first + places, {k: v[places] for k, v in rows.items()})


def changed_documents(before: State, after: State, stop: int) -> Iterator[NDArray[np.int64]]:
    """The documents before `stop` that were kept and are not any more, or the reverse.

    Documents that are removed are not among them.
    """
    for (first, old), (_, new) in zip(before.rows(0, stop), after.rows(0, stop), strict=True):
        numbers = np.arange(first, first + len(old["twin"]))
        was_kept, is_kept = (rows["twin"] == numbers for rows in (old, new))
        yield numbers[(was_kept != is_kept) & (new["root"] != GONE)]


def documents_at(
    segments: Segments, state: State, dumps: Sequence[Dump], numbers: NDArray[np.int64]
) -> pa.Table:
    """The rows of SCHEMA of those of the documents that are left."""
    rows = {name: state.column(name).take(numbers) for name in STATE}
    is_left = rows["root"] != GONE
    return _table(segments, dumps, numbers[is_left], {k: v[is_left] for k, v in rows.items()})


def write_tables(path: Path, tables: Iterable[pa.Table], columns: Sequence[str]) -> int:
    """Write some columns of the tables to Parquet; the number of rows."""
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    with pq.ParquetWriter(path, schema) as writer:
        rows = 0
        for table in tables:
            if len(table):
                writer.write_table(table.select(list(columns)))
            rows += len(table)
    return rows


def export_clusters(folder: Path, out: Path) -> int:
    """Write what became of every document of an index, in the order they came; their number.

    Raises:
        DataError: there is no index, it is damaged, or another process holds it.
    """
    with held_index(folder) as index:
        segments = index.segments
        rows = documents_of(segments, index.state, index.contents.dumps, 0, segments.documents)
        return write_tables(out, rows, SCHEMA.names)


def _table(
    segments: Segments,
    dumps: Sequence[Dump],
    numbers: NDArray[np.int64],
    rows: dict[str, NDArray[Any]],
) -> pa.Table:
    is_kept = rows["twin"] == numbers
    original = segments.take("original", numbers)
    starts = np.array([dump.first for dump in dumps], np.int64)
    columns = {
        "id": segments.ids(numbers),
        "dump": np.searchsorted(starts, numbers, "right") - 1,
        "cluster": rows["root"],
        "kept": is_kept,
        "exact": ~is_kept & (original == segments.take("original", rows["twin"])),
        "twin": pc.if_else(pa.array(is_kept), None, segments.ids(rows["twin"])),
        "jaccard": pa.array(rows["jaccard"], mask=is_kept),
    }
    return pa.table(columns, SCHEMA)
