"""Columns of numbers on disk, in pages that are checked whenever they are read.

A page has 4080 bytes of values, their number, and a checksum. So a few values cost a page or two,
what is read is right, and nothing else of an index need be read to know that.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dedup.index.kernels import checksums
from data_pipeline.errors import DataError

PAGE_BYTES = 4096
PAYLOAD_BYTES = 4080
WORDS = PAGE_BYTES // 8
# Pages that are read although nothing of them is wanted, rather than to seek.
SMALLEST_SEEK = 8
MOST_PAGES = 1 << 12
ROWS_AT_ONCE = 1 << 17


class ColumnWriter:
    """Appends values to a new file, which is whole when it is closed."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        self._per_page = PAYLOAD_BYTES // self._dtype.itemsize
        self._left = np.empty(0, self._dtype)
        self._pages = 0
        self._file = path.open("wb")

    def append(self, values: NDArray[Any]) -> None:
        values = np.ascontiguousarray(values, self._dtype)
        step = MOST_PAGES * self._per_page
        for start in range(0, len(values), step):
            some = np.concatenate([self._left, values[start : start + step]])
            full = len(some) // self._per_page * self._per_page
            self._write(some[:full])
            self._left = some[full:]

    def _write(self, values: NDArray[Any]) -> None:
        if not len(values):
            return
        count = -(-len(values) // self._per_page)
        pages = np.zeros((count, WORDS), np.uint64)
        payload = np.zeros((count, PAYLOAD_BYTES), np.uint8)
        payload.reshape(-1)[: values.nbytes] = values.view(np.uint8)
        pages.view(np.uint8)[:, :PAYLOAD_BYTES] = payload
        pages[:, -2] = self._per_page
        pages[-1, -2] = len(values) - (count - 1) * self._per_page
        pages[:, -1] = checksums(pages, self._pages)
        pages.tofile(self._file)
        self._pages += count

    def __enter__(self) -> "ColumnWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        self._file.close()

    def close(self) -> None:
        """Write what is left; the file is whole."""
        with self._file:
            self._write(self._left)


class Column:
    """A file of a `ColumnWriter`; it is open only while it is read.

    Raises, as all methods do:
        DataError: the file is missing or damaged.
    """

    def __init__(self, path: Path, dtype: Any) -> None:
        self.path = path
        self._dtype = np.dtype(dtype)
        self._per_page = PAYLOAD_BYTES // self._dtype.itemsize
        try:
            size = path.stat().st_size
        except OSError as error:
            raise _damaged(path, error.strerror or str(error)) from error
        self._pages = size // PAGE_BYTES
        if size % PAGE_BYTES:
            raise _damaged(path, f"its {size} bytes are not whole pages of {PAGE_BYTES}")
        self._rows = 0
        if self._pages:
            last = int(self._read(self._pages - 1, self._pages)[0, -2])
            self._rows = (self._pages - 1) * self._per_page + last

    def __len__(self) -> int:
        return self._rows

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The values of the rows from `start` on, and before `stop`."""
        if start >= stop:
            return np.empty(0, self._dtype)
        first, last = start // self._per_page, (stop - 1) // self._per_page + 1
        values = np.empty(stop - start, self._dtype)
        for page in range(first, last, MOST_PAGES):
            some = self._values(page, min(page + MOST_PAGES, last))
            place = page * self._per_page
            begin, end = max(start, place), min(stop, place + len(some))
            values[begin - start : end - start] = some[begin - place : end - place]
        return values

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[NDArray[Any]]:
        """The values of the rows, some of them at a time."""
        stop = self._rows if stop is None else stop
        for row in range(start, stop, ROWS_AT_ONCE):
            yield self.read(row, min(row + ROWS_AT_ONCE, stop))

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """The values of some rows; reads each page that has one of them once."""
        values = np.empty(len(rows), self._dtype)
        order = np.argsort(rows, kind="stable")
        rows = rows[order]
        pages = rows // self._per_page
        is_far = np.diff(pages, prepend=-MOST_PAGES) > SMALLEST_SEEK
        begins = np.flatnonzero(is_far | (np.diff(pages // MOST_PAGES, prepend=-1) > 0)).tolist()
        for begin, end in pairwise([*begins, len(rows)]):
            first = int(pages[begin])
            some = self._values(first, int(pages[end - 1]) + 1)
            values[order[begin:end]] = some[rows[begin:end] - first * self._per_page]
        return values

    def _values(self, first: int, last: int) -> NDArray[Any]:
        pages = self._read(first, last)
        payload = pages.view(np.uint8)[:, : self._per_page * self._dtype.itemsize]
        return np.ascontiguousarray(payload).view(self._dtype).reshape(-1)

    def _read(self, first: int, last: int) -> NDArray[np.uint64]:
        try:
            words = np.fromfile(
                self.path, np.uint64, (last - first) * WORDS, "", first * PAGE_BYTES
            )
        except OSError as error:
            raise _damaged(self.path, error.strerror or str(error)) from error
        pages = words[: len(words) // WORDS * WORDS].reshape(-1, WORDS)
        wrong = np.flatnonzero(checksums(pages, first) != pages[:, -1])
        if len(wrong):
            where = (first + int(wrong[0])) * PAGE_BYTES
            raise _damaged(self.path, f"the page at byte {where} is not what was written")
        if len(pages) < last - first:
            raise _damaged(self.path, "it ends too early")
        return pages


def _damaged(path: Path, what: str) -> DataError:
    return DataError(
        f"{path}: the index is damaged here, {what}; restore {path.parent.name} from a copy, or "
        "build the index anew"
    )
