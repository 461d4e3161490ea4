"""Documents in batches of bounded size, worked on by threads, in input order."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.dedup.inputs import Part, without_views
from data_pipeline.errors import DataError

BYTES_PER_BATCH = 8 << 20
ROWS_PER_BATCH = 1 << 14
BATCHES_PER_WORKER = 2

Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch:
    """Consecutive documents of a part.

    Attributes:
        row: the place of the first one among all documents.
        row_in_part: the same in its part.
        is_signed: whether these are rows of the part's signed documents, not of its texts.
    """

    part: Part
    row: int
    row_in_part: int
    records: pa.RecordBatch
    is_signed: bool = False

    def locate(self, document: int) -> str:
        """Where the user finds a document of the batch."""
        return self.part.locate(self.row_in_part + document)


def read_batches(
    parts: Sequence[Part], columns: Sequence[str] | None = None, signed: Sequence[str] = ()
) -> Iterator[Batch]:
    """The documents of all parts, about 8 MB at a time.

    Args:
        columns: those of them that a part has are read; by default all.
        signed: columns that are read instead, if there are any, of a part that is signed.

    Raises:
        DataError: an input is damaged, or a document has no text.
    """
    row = 0
    for part in parts:
        row_in_part = 0
        is_signed = bool(signed) and part.signed is not None
        for records in read_part(part, signed if is_signed else columns, is_signed):
            batch = Batch(part, row, row_in_part, records, is_signed)
            if not is_signed:
                _refuse_no_text(batch)
            yield batch
            row += len(records)
            row_in_part += len(records)


def map_batches(
    function: Callable[[Batch], Result], batches: Iterator[Batch], workers: int
) -> Iterator[Result]:
    """function(batch) of each batch, in order; few are in memory at a time.

    One worker is this thread. The functions spend their time outside the interpreter lock, so that
    threads are as good as processes and need no copies.
    """
    if workers == 1:
        yield from map(function, batches)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        for batch in batches:
            waiting.append(pool.submit(function, batch))
            if len(waiting) > BATCHES_PER_WORKER * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def read_part(
    part: Part, columns: Sequence[str] | None, is_signed: bool = False
) -> Iterator[pa.RecordBatch]:
    """The rows of a part, or of its signed documents, about 8 MB at a time.

    Args:
        columns: those of them that it has are read.

    Raises:
        DataError: it is damaged.
    """
    try:
        with pq.ParquetFile(part.signed if is_signed else part.path) as file:
            names = columns and [name for name in columns if name in file.schema_arrow.names]
            for records in read_rows(file, names):
                records.validate(full=True)
                schema = without_views(records.schema)
                yield records if schema == records.schema else records.cast(schema)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{part.source}: damaged, its documents cannot be read: {error}") from error


def read_rows(
    file: pq.ParquetFile, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of a file, or these columns of them, about 8 MB at a time."""
    # One by one: over several row groups, pyarrow keeps all that it has read.
    for group in range(file.num_row_groups):
        rows = _rows_per_batch(file.metadata.row_group(group))
        yield from file.iter_batches(rows, [group], columns, use_threads=False)


def _rows_per_batch(group: pq.RowGroupMetaData) -> int:
    bytes_per_row = group.total_byte_size // max(group.num_rows, 1)
    return max(1, min(ROWS_PER_BATCH, BYTES_PER_BATCH // max(bytes_per_row, 1)))


def _refuse_no_text(batch: Batch) -> None:
    texts = batch.records["text"]
    if texts.null_count:
        document = texts.is_null().index(True).as_py()
        raise DataError(f"{batch.locate(document)} has no `text`; add it or remove the document")
