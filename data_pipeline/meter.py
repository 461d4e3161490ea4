"""How fast all workers clean, from counters in a file that they share."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROW = np.dtype([("bytes", np.int64), ("documents", np.int64), ("passed", np.int64)])


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
        read, documents, passed = (int(self._rows[name].sum()) for name in ROW.names or ())
        seconds = time.monotonic() - self._began
        if not read or not documents:
            return ""
        left = max(0, self._left - read) * seconds / read
        return (
            f"{read / seconds / 1e6:.1f} MB/s, {documents / seconds:,.0f} documents/s, "
            f"{passed / documents:.0%} pass, {_duration(left)} left"
        )


class Counter:
    """A part's row of a meter; its process alone writes there."""

    def __init__(self, path: Path, row: int) -> None:
        self._row = np.memmap(path, ROW, "r+", offset=row * ROW.itemsize, shape=(1,))

    def count(self, read: int, documents: int, passed: int) -> None:
        self._row[0] = read, documents, passed


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
