"""The end of a file that grows, without reading what comes before."""

import os
from pathlib import Path

BLOCK_BYTES = 1 << 16


def start_of_last(path: Path, count: int) -> int:
    """Where the last `count` complete lines begin, in bytes; the start of the file where there are
    not so many. Raises FileNotFoundError.
    """
    with path.open("rb") as file:
        start = file.seek(0, os.SEEK_END)
        end = b""
        # One more newline than lines: that before the first of them.
        while start and end.count(b"\n") <= count:
            size = min(start, max(BLOCK_BYTES, len(end)))
            start = file.seek(start - size)
            end = file.read(size) + end
    *before, _ = end.split(b"\n")
    passed = before[: max(0, len(before) - count)]
    return start + sum(len(line) + 1 for line in passed)


def last_lines(path: Path, count: int) -> list[str]:
    """The last `count` complete lines; fewer where there are not so many.

    Raises FileNotFoundError.
    """
    with path.open("rb") as file:
        file.seek(start_of_last(path, count))
        text = file.read().decode(errors="replace")
    return text.split("\n")[:-1]
