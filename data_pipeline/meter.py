"""How fast all workers clean, from counters in a file that they share."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

COUNTED = ("bytes", "documents", "passed", "written", "cpu_ms")
ROW = np.dtype([(name, np.int64) for name in COUNTED])


class Meter:
    """The speed of a stage whose parts are counted one row each."""

    def __init__(self, path: Path, sizes: Sequence[int], are_done: Sequence[bool]) -> None:
        """
        Args:
            path: of the file, which is made anew.
            sizes: of the parts, in bytes.
            are_done: those that were done before, and count for nothing but what is left.
        """
        # Written rather than mapped into a hole: a full disk would be a signal, not an error.
        path.write_bytes(bytes(ROW.itemsize * len(sizes)))
        self.path = path
        self._rows = np.memmap(path, ROW, "r")
        self._left = sum(size for size, is_done in zip(sizes, are_done, strict=True) if not is_done)
        self._began = time.monotonic()

    def speed(self) -> str:
        """What a person wants to know of it; nothing before anything was read."""
        read, documents, passed = (int(self._rows[name].sum()) for name in COUNTED[:3])
        seconds = time.monotonic() - self._began
        if not read or not documents:
            return ""
        left = max(0, self._left - read) * seconds / read
        return (
            f"{read / seconds / 1e6:.1f} MB/s, {documents / seconds:,.0f} documents/s, "
            f"{passed / documents:.0%} pass, {_duration(left)} left"
        )

    def counts(self) -> dict[str, float]:
        """What all parts have counted so far, as `rates.timed` takes it."""
        # Other machines may write there, of which a mapping need not know.
        rows = np.fromfile(self.path, ROW)
        read, documents, _, written, cpu_ms = (int(rows[name].sum()) for name in COUNTED)
        return {
            "documents": documents,
            "bytes_in": read,
            "bytes_out": written,
            "cpu_s": cpu_ms / 1000,
            "share": read / self._left if self._left else 1.0,
        }


class Counter:
    """A part's row of a meter; its process alone writes there.

    What is counted is that of the process that does the part; its time is added to that of those
    which have tried before.
    """

    def __init__(self, path: Path, row: int) -> None:
        self._row = np.memmap(path, ROW, "r+", offset=row * ROW.itemsize, shape=(1,))
        self._spent_ms = int(self._row["cpu_ms"][0]) - _cpu_ms()

    def count(self, read: int, documents: int, passed: int, written: int) -> None:
        """
        Args:
            read: bytes of the part.
            passed: of the documents.
            written: bytes of the texts of these.
        """
        self._row[0] = read, documents, passed, written, self._spent_ms + _cpu_ms()


def _cpu_ms() -> int:
    """Of this process and those that it has waited for."""
    return round(1000 * sum(os.times()[:4]))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
