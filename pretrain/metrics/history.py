"""metrics.jsonl, of any length, as what is drawn of it: read once, in bounded memory, and followed.

Rows are parsed by pyarrow, a block at a time; what it does not take (a value that is not finite, a
line that is no JSON) is left to Python's parser, at a third of the speed.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.metrics.downsample import ColumnAverager, Downsampler, Series, StepMap
from pretrain.metrics.rows import Damage, parse_rows

BLOCK_BYTES = 8 << 20
LONGEST_LINE = 64 << 20
# Compared where reading goes on, to see whether the file still is the one that was read.
COMPARED_BYTES = 256
LEVELS_PER_UNIT = 64
NO_DATA = 255


@dataclass(frozen=True)
class LoadHistory:
    """Expert loads over the steps, averaged within columns of equal width.

    Attributes:
        level: [layers, experts, columns] uint8: load * experts * LEVELS_PER_UNIT, so that balanced
            routing is LEVELS_PER_UNIT; NO_DATA where no step was logged.
        first_step: left edge of the first column.
        last_step: right edge of the last column.
    """

    level: NDArray[np.uint8]
    first_step: float
    last_step: float


@dataclass(frozen=True)
class History:
    """What a run has logged.

    Attributes:
        rows: how many there are.
        series: the metrics that are numbers; a number within mappings is called
            `metric/key/key`.
        maps: the metrics that are lists, averaged within columns of steps.
        damage: the lines that could not be read, if there are any.
    """

    rows: int
    series: dict[str, Series]
    maps: dict[str, StepMap]
    damage: Damage | None

    def last(self, name: str) -> float | None:
        """The metric's last value, or None if it was never logged."""
        series = self.series.get(name)
        return None if series is None else float(series.value[-1])

    def parts(self, name: str) -> dict[str, Series]:
        """The numbers within a metric that is a mapping, by their keys."""
        return {
            key.removeprefix(f"{name}/"): series
            for key, series in self.series.items()
            if key.startswith(f"{name}/")
        }

    @property
    def load(self) -> LoadHistory | None:
        load = self.maps.get("moe/load")
        if load is None or load.mean.ndim != 3:
            return None
        level = np.round(load.mean * load.mean.shape[1] * LEVELS_PER_UNIT).clip(0, NO_DATA - 1)
        level = np.where(np.isnan(level), NO_DATA, level).astype(np.uint8)
        return LoadHistory(level, load.first_step, load.last_step)


class _Place(NamedTuple):
    """How far a file was read, and how to see that it is still the same one."""

    offset: int
    inode: int
    before: bytes


class HistoryReader:
    """Reads metrics.jsonl, and then what is appended to it.

    A last line without its end waits until it is whole. A file that was replaced or cut back, as
    after a rollback, is read anew from its beginning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin()

    def _begin(self) -> None:
        self._place = _Place(0, 0, b"")
        self._rows = 0
        self._is_within_line = False
        self._series: dict[str, Downsampler] = {}
        self._maps: dict[str, ColumnAverager] = {}
        self._lines = 0
        self._damage: Damage | None = None
        self._size = 0

    @property
    def share_read(self) -> float:
        """Of the file as it was when it was last looked at; 1 if less than a block is left."""
        left = self._size - self._place.offset
        return 1.0 if left < BLOCK_BYTES else self._place.offset / self._size

    def read_all(self) -> bool:
        """Read all that is new; whether anything was."""
        has_news = False
        while self.read_block():
            has_news = True
        return has_news

    def read_block(self) -> bool:
        """Read at most about BLOCK_BYTES of what is new; whether anything was."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            had_rows = self._place.offset > 0
            self._begin()
            return had_rows
        with file:
            status = os.fstat(file.fileno())
            was_cut = self._is_another(file, status)
            if was_cut:
                self._begin()
            self._size = status.st_size
            lines = self._whole_lines(file)
            if lines:
                self._take(lines)
                before = lines[-COMPARED_BYTES:]
                self._place = _Place(self._place.offset + len(lines), status.st_ino, before)
        return was_cut or bool(lines)

    def _is_another(self, file: BinaryIO, status: os.stat_result) -> bool:
        offset, inode, before = self._place
        if not offset:
            return False
        if status.st_ino != inode or status.st_size < offset:
            return True
        file.seek(offset - len(before))
        return file.read(len(before)) != before

    def _whole_lines(self, file: BinaryIO) -> bytes:
        file.seek(self._place.offset)
        block = b""
        wanted = BLOCK_BYTES
        while len(block) < LONGEST_LINE:
            more = file.read(wanted)
            block += more
            end = block.rfind(b"\n") + 1
            if end or not more:
                return block[:end]
            wanted = len(block)
        return block

    def _take(self, lines: bytes) -> None:
        is_rest, self._is_within_line = self._is_within_line, not lines.endswith(b"\n")
        if is_rest:
            lines = lines.partition(b"\n")[2]
        parsed = parse_rows(lines, self._lines + 1)
        self._lines += parsed.lines
        self._damage = parsed.damage.after(self._damage) if parsed.damage else self._damage
        self._rows += parsed.rows
        for name, step, value in parsed.columns:
            if value.ndim == 1:
                self._series.setdefault(name, Downsampler()).add(step, value)
            else:
                averager = self._maps.setdefault(name, ColumnAverager(value.ndim - 1))
                if averager.dimensions == value.ndim - 1:
                    averager.add(step, value)

    def history(self) -> History:
        """What was read so far."""
        return History(
            self._rows,
            {name: series.series() for name, series in self._series.items()},
            {name: averager.map() for name, averager in self._maps.items()},
            self._damage,
        )


def read_history(path: Path) -> History:
    """Read metrics.jsonl, which may be missing; a half-written last line is left out."""
    reader = HistoryReader(path)
    reader.read_all()
    return reader.history()
