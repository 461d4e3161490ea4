"""When documents were fetched, for those that keep the newest of a cluster."""

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.dedup.batches import Batch
from data_pipeline.dedup.inputs import Part, without_views
from data_pipeline.errors import DataError

TIMESTAMP = "timestamp"
EXTRA = "extra"  # the other fields of JSON Lines
DECODER = json.JSONDecoder(parse_int=str)  # int refuses thousands of digits
ALLOWED = "a timestamp or a string as in 2024-03-01T00:00:00Z, which is how WARC-Date is written"


def require_timestamps(parts: Sequence[Part]) -> None:
    """Raise a DataError that names the first input without a column of timestamps."""
    for part in parts:
        schema = without_views(pq.read_schema(part.path))
        if TIMESTAMP in schema.names:
            kind = schema.field(TIMESTAMP).type
            if not (pa.types.is_timestamp(kind) or _is_string(kind)):
                raise DataError(
                    f"{part.source}: column `{TIMESTAMP}` is {kind}, it must be {ALLOWED}"
                )
        elif EXTRA not in schema.names or not _is_string(schema.field(EXTRA).type):
            raise DataError(
                f"{part.source}: keep=newest needs a column `{TIMESTAMP}`, but the columns are "
                f"{', '.join(schema.names)}; add it ({ALLOWED}), or choose keep=longest or first"
            )


def timestamps(batch: Batch) -> NDArray[np.int64]:
    """Microseconds since 1970 of each document.

    A column of timestamps without a zone is in UTC; a string must say its zone.

    Raises:
        DataError: a document has no timestamp, or one that is no time.
    """
    if TIMESTAMP in batch.records.schema.names:
        values = batch.records[TIMESTAMP]
    else:
        found = [_timestamp_in(extra or "{}") for extra in batch.records[EXTRA].to_pylist()]
        values = pa.array([None if time is None else str(time) for time in found], pa.string())
    if values.null_count:
        document = values.is_null().index(True).as_py()
        raise DataError(
            f"{batch.locate(document)} has no `{TIMESTAMP}`, which keep=newest needs; add it "
            f"({ALLOWED}), or choose keep=longest or first"
        )
    if _is_string(values.type):
        values = _parse(values, batch)
    return values.cast(pa.timestamp("us"), safe=False).cast(pa.int64()).to_numpy()


def _timestamp_in(extra: str) -> object:
    """None if there is none, or if the column is of another kind that has the same name."""
    try:
        fields = DECODER.decode(extra)
    except (ValueError, RecursionError):
        return None
    return fields.get(TIMESTAMP) if isinstance(fields, dict) else None


def _parse(values: pa.Array, batch: Batch) -> pa.Array:
    try:
        return _utc(values)
    except pa.ArrowInvalid:
        for document in range(len(values)):
            try:
                _utc(values[document : document + 1])
            except pa.ArrowInvalid as error:
                raise DataError(
                    f"{batch.locate(document)}: `{TIMESTAMP}` is {values[document].as_py()!r:.40}, "
                    f"it must be {ALLOWED}"
                ) from error
        raise


def _utc(values: pa.Array) -> pa.Array:
    return values.cast(pa.timestamp("ns", "UTC"))


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
