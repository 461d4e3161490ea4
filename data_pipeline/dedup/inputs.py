"""Documents of any accepted file type, as Parquet parts that Daft reads in order.

JSON Lines are not read by Daft or pyarrow: Daft drops fields that first appear late in a file, both
rewrite values to fit one type per field, and pyarrow refuses what does not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.dedup.jsonl import read_jsonl
from data_pipeline.errors import DataError

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
REQUIRED = ("id", "text")


@dataclass(frozen=True)
class Part:
    """A Parquet file of documents and where they came from.

    Attributes:
        first_row: the place of its first document in `source`, counted from 0.
    """

    path: Path
    source: Path
    first_row: int
    rows: int


def parquet_parts(inputs: Sequence[Path], scratch: Path) -> list[Part]:
    """Parquet files under `scratch` that hold the documents of `inputs`, in order.

    Parquet inputs are linked and keep their columns; JSON Lines get those of `read_jsonl`.

    Raises:
        DataError: a file is missing, unreadable, of an unknown type, or lacks `id` or `text`.
    """
    parts: list[Part] = []
    for source in inputs:
        _refuse_unreadable(source)
        if source.suffix == ".parquet":
            path = scratch / f"{len(parts):06d}.parquet"
            path.symlink_to(source.resolve())
            parts.append(Part(path, source, 0, _checked_rows(source)))
        elif source.name.endswith(JSONL_SUFFIXES):
            first_row = 0
            for table in read_jsonl(source):
                path = scratch / f"{len(parts):06d}.parquet"
                pq.write_table(table, path)
                parts.append(Part(path, source, first_row, len(table)))
                first_row += len(table)
        else:
            allowed = ", ".join((".parquet", *JSONL_SUFFIXES))
            raise DataError(f"{source}: unknown file type; allowed are {allowed}")
    return parts


def read_ids(parts: Sequence[Part]) -> pa.Array:
    """The ids of all documents, in input order.

    Raises:
        DataError: an id is missing or stands twice.
    """
    columns = [_read(part, ["id"])["id"] for part in parts]
    chunks = [chunk.cast(pa.large_string()) for column in columns for chunk in column.chunks]
    ids = pa.chunked_array(chunks, pa.large_string()).combine_chunks()
    refuse_null(parts, "id", ids)
    if len(ids.unique()) < len(ids):
        seen: dict[str, int] = {}
        for row, name in enumerate(ids.to_pylist()):
            if name in seen:
                first, second = _locate(parts, seen[name]), _locate(parts, row)
                raise DataError(f"id `{name}` stands twice: {first} and {second}; make ids unique")
            seen[name] = row
    return ids


def refuse_null(parts: Sequence[Part], column: str, values: pa.Array) -> None:
    """Raise a DataError that names the first document without a value."""
    if values.null_count:
        row = int(np.flatnonzero(values.is_null())[0])
        raise DataError(f"{_locate(parts, row)} has no `{column}`; add it or remove the document")


def refuse_damage(parts: Sequence[Part]) -> None:
    """Raise a DataError that names the first input whose documents cannot be read."""
    for part in parts:
        _read(part, REQUIRED)


def read_batches(part: Part) -> Iterator[pa.RecordBatch]:
    """The documents of a part with all their columns.

    Raises:
        DataError: the input is damaged.
    """
    try:
        yield from pq.ParquetFile(part.path).iter_batches()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{part.source}: damaged, its documents cannot be read: {error}") from error


def _refuse_unreadable(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _read(part: Part, columns: Sequence[str]) -> pa.Table:
    try:
        table = pq.read_table(part.path, columns=list(columns))
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{part.source}: damaged, its documents cannot be read: {error}") from error
    return table


def _locate(parts: Sequence[Part], row: int) -> str:
    for part in parts:
        if row < part.rows:
            return f"document {part.first_row + row} (counted from 0) of {part.source}"
        row -= part.rows
    raise IndexError(row)


def _checked_rows(path: Path) -> int:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged or not Parquet ({error})") from error
    schema = file.schema_arrow
    for name in REQUIRED:
        if name not in schema.names:
            raise DataError(
                f"{path}: no column `{name}` among {', '.join(schema.names)}; rename the column "
                f"that holds the {name}"
            )
        found = schema.field(name).type
        if found not in (pa.string(), pa.large_string(), pa.string_view()):
            raise DataError(f"{path}: column `{name}` is {found}, it must be string")
    return int(file.metadata.num_rows)
