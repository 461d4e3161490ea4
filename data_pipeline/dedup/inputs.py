"""Documents of any accepted file type, as Parquet parts.

JSON Lines are not read by pyarrow: it rewrites values to fit one type per field, and refuses what
does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.dedup.jsonl import read_jsonl
from data_pipeline.errors import DataError

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
REQUIRED = ("id", "text")
# pyarrow neither takes nor filters rows of views.
WITHOUT_VIEWS = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}


@dataclass(frozen=True)
class Part:
    """A Parquet file of documents and where they came from.

    Attributes:
        first_row: the place of its first document in `source`, counted from 0.
        signed: the file of its signed documents (`dedup.signed`), if they are.
    """

    path: Path
    source: Path
    first_row: int
    rows: int
    signed: Path | None = None

    def locate(self, row: int) -> str:
        """Where the user finds the document of a row."""
        return f"document {self.first_row + row} (counted from 0) of {self.source}"


def parquet_parts(inputs: Sequence[Path], scratch: Path) -> list[Part]:
    """Parquet files under `scratch` that hold the documents of `inputs`, in order.

    Parquet inputs are linked and keep their columns; JSON Lines get those of `read_jsonl`.

    Raises:
        DataError: a file is missing, unreadable, of an unknown type, or lacks `id` or `text`.
    """
    parts: list[Part] = []
    for source in inputs:
        refuse_unreadable(source)
        if source.suffix == ".parquet":
            path = scratch / f"{len(parts):06d}.parquet"
            path.symlink_to(source.resolve())
            with open_parquet(source) as file:
                parts.append(Part(path, source, 0, file.metadata.num_rows))
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
    chunks = [chunk for part in parts for chunk in _read_ids(part)]
    ids = pa.chunked_array(chunks, pa.large_string()).combine_chunks()
    if ids.null_count:
        row = ids.is_null().index(True).as_py()
        raise DataError(f"{_locate(parts, row)} has no `id`; add it or remove the document")
    if len(ids.unique()) < len(ids):
        seen: dict[str, int] = {}
        for row, name in enumerate(ids.to_pylist()):
            if name in seen:
                first, second = _locate(parts, seen[name]), _locate(parts, row)
                raise DataError(f"id `{name}` stands twice: {first} and {second}; make ids unique")
            seen[name] = row
    return ids


def refuse_unreadable(path: Path) -> None:
    """Raises a DataError that says why, if the file cannot be opened."""
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _read_ids(part: Part) -> list[pa.Array]:
    try:
        table = pq.read_table(part.path, columns=["id"])
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{part.source}: damaged, its documents cannot be read: {error}") from error
    return [chunk.cast(pa.large_string()) for chunk in table["id"].chunks]


def _locate(parts: Sequence[Part], row: int) -> str:
    for part in parts:
        if row < part.rows:
            return part.locate(row)
        row -= part.rows
    raise IndexError(row)


def without_views(schema: pa.Schema) -> pa.Schema:
    """A schema whose columns can be worked with, of the same values."""
    fields = [field.with_type(WITHOUT_VIEWS.get(field.type, field.type)) for field in schema]
    return pa.schema(fields, schema.metadata)


def open_parquet(
    path: Path, required: Sequence[str] = REQUIRED, optional: Sequence[str] = ()
) -> pq.ParquetFile:
    """The file, whose columns of these names are strings; the optional ones may be absent.

    Raises:
        DataError: the file is damaged, a column is missing or of another type.
    """
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged or not Parquet ({error})") from error
    schema = file.schema_arrow
    for name in required:
        if name not in schema.names:
            raise DataError(
                f"{path}: no column `{name}` among {', '.join(schema.names)}; rename the column "
                f"that holds the {name}"
            )
    for name in (*required, *optional):
        found = schema.field(name).type if name in schema.names else pa.string()
        if found not in (pa.string(), pa.large_string(), pa.string_view()):
            raise DataError(f"{path}: column `{name}` is {found}, it must be string")
    return file
