"""The documents that deduplication keeps of a run, in files."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.clean import own_ids

ROWS_AT_ONCE = 256


def kept_files(folder: Path) -> list[Path]:
    """The files of a folder of kept documents, in the order of the archives."""
    return sorted(folder.glob("*.parquet"))


def read_texts(file: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, str]]:
    """The own id and the text of each document from `start` on, and before `stop`."""
    with pq.ParquetFile(file) as parquet:
        stop = parquet.metadata.num_rows if stop is None else stop
        row = 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if row < stop and row + rows > start:
                yield from islice(_texts_of(parquet, group), max(0, start - row), stop - row)
            row += rows


def _texts_of(parquet: pq.ParquetFile, group: int) -> Iterator[tuple[str, str]]:
    for batch in parquet.iter_batches(ROWS_AT_ONCE, [group], ["id", "text"]):
        ids, texts = own_ids(batch["id"]).to_pylist(), batch["text"].to_pylist()
        yield from zip(ids, texts, strict=True)


def read_sizes(file: Path) -> Iterator[NDArray[np.int64]]:
    """The bytes of each text, before deduplication took parts of it, some at a time."""
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(columns=["bytes"]):
            yield batch["bytes"].to_numpy()
