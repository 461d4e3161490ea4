"""Where logged rows go: metrics.jsonl, the truth of a run; wandb_sink.py mirrors it."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from pretrain.errors import UserError
from pretrain.metrics.registry import check_names
from pretrain.run_dir import writing

Row = Mapping[str, Any]

# Read at a time where a file is read from its end.
TAIL_BYTES = 1 << 16
COPIED_AT_ONCE = 1 << 24
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Sink(Protocol):
    """Takes the rows of a run, one per logged step."""

    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Sends each row to every sink, after checking its names against the registry.

    Args:
        check_attempt: raises if rows may no longer be written (`RunDirectory.check_attempt`).
    """

    def __init__(
        self, sinks: Sequence[Sink], check_attempt: Callable[[], None] = lambda: None
    ) -> None:
        self.sinks = sinks
        self.check_attempt = check_attempt

    def log(self, row: Row) -> None:
        """Write one row; ValueError if a name is not registered or `train/step` is missing."""
        check_names(row)
        if "train/step" not in row:
            raise ValueError(f"a row needs train/step, this one has only {sorted(row)}")
        self.check_attempt()
        for sink in self.sinks:
            sink.write(row)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


class JsonlSink:
    """Appends each row as one line of JSON, in full precision, at once.

    A row that cannot be written ends the run: reports and audits read this file, and on a disk that
    is full the next record of the ledger and the next checkpoint would fail as well.

    Numbers that are not finite become the strings "NaN", "Infinity" and "-Infinity", because JSON
    has no such numbers; `read_metrics` turns them back.

    Raises: each method WriteError, with whole rows in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def write(self, row: Row) -> None:
        line = _line_of(row)
        with writing(self.path):
            try:
                self._append(line.encode())
            except OSError:
                with suppress(OSError):
                    self._file.truncate(self._end)
                raise

    def cut_back(self, step: int, folder: Path, then: Sequence[Row] = ()) -> None:
        """Drop the rows after `step`, the step of the checkpoint that the run resumes from.

        A half-written last line goes too. The rows kept always move to a new file, so that a rank
        of an earlier attempt that is still running no longer writes into the run's metrics.

        Args:
            folder: where to write that file, which is then renamed into place.
            then: rows that follow those kept, with them or not at all.
        """
        aside = folder / self.path.name
        with writing(aside):
            try:
                with self.path.open("rb") as rows, aside.open("wb") as kept:
                    end = self._end_of(step, rows)
                    rows.seek(0)
                    while some := rows.read(min(end - rows.tell(), COPIED_AT_ONCE)):
                        kept.write(some)
                    kept.writelines(_line_of(row).encode() for row in then)
                    kept.flush()
                    os.fsync(kept.fileno())
            except OSError:
                with suppress(OSError):
                    aside.unlink()
                raise
        self.close()
        with writing(self.path):
            aside.rename(self.path)
        self._open()

    def close(self) -> None:
        # Where a file system on the network has no room, this is when it says so.
        with writing(self.path):
            self._file.close()

    def _end_of(self, step: int, rows: BinaryIO) -> int:
        """Where the row of `step` ends, or of the step before it. A file may have many GB."""
        for begin, line in _lines_from_the_end(rows):
            if _parse(line.decode(errors="replace"), self.path)["train/step"] <= step:
                return begin + len(line)
        return 0

    def _open(self) -> None:
        with writing(self.path):
            self._file = self.path.open("ab", buffering=0)
        self._end = self._file.tell()

    def _append(self, content: bytes) -> None:
        written = 0
        while written < len(content):
            written += self._file.write(content[written:])
        self._end += len(content)


def step_line(row: Row, steps: int) -> str:
    """A row as the one line that a log shows of it."""
    held_out = row.get("eval/heldout_loss", {})
    of_sources = "".join(f"  {name} {loss:.4f}" for name, loss in held_out.items())
    return (
        f"step {row['train/step']}/{steps}  loss {row['train/loss']:.4f}  "
        f"grad norm {row['train/grad_norm']:.3f}  lr {row['train/lr']:.2e}  "
        f"{row['perf/tokens_per_s']:,.0f} tokens/s" + (of_sources and f"  held out:{of_sources}")
    )


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl, one at a time; a half-written last line is left out.

    Raises UserError where another line is not JSON.
    """
    for line in _complete_lines(path):
        yield _row_of(line, path)


def last_row(path: Path) -> dict[str, Any]:
    """The last row of metrics.jsonl, however long that is; empty if there is none."""
    with path.open("rb") as file:
        for _, line in _lines_from_the_end(file):
            return _row_of(line.decode(errors="replace"), path)
    return {}


def last_step(path: Path) -> int:
    """The step of the last row of metrics.jsonl, 0 if there is none."""
    return int(last_row(path).get("train/step", 0))


def row_lacks(path: Path, step: int, name: str) -> bool:
    """Whether the last row of metrics.jsonl is that of `step`, and does not have this metric."""
    row = last_row(path) if path.exists() else {}
    return row.get("train/step") == step and name not in row


def _line_of(row: Row) -> str:
    try:
        line = json.dumps(row, allow_nan=False)
    except ValueError:
        line = json.dumps(_map_numbers(row, to_json))
    return f"{line}\n"


def _complete_lines(path: Path) -> Iterator[str]:
    with path.open(errors="replace") as file:
        for line in file:
            if line.endswith("\n"):
                yield line


def _lines_from_the_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The complete lines, the last first, each with where it begins."""
    begin, tail = file.seek(0, os.SEEK_END), b""
    while begin:
        end, begin = begin, max(0, begin - TAIL_BYTES)
        file.seek(begin)
        tail = file.read(end - begin) + tail
        # What stands before the first line break may begin further in front.
        first = tail.find(b"\n") + 1 if begin else 0
        stop = tail.rfind(b"\n") + 1
        while stop > first:
            start = max(first, tail.rfind(b"\n", 0, stop - 1) + 1)
            yield begin + start, tail[start:stop]
            stop = start
        tail = tail[:first]


def _row_of(line: str, path: Path) -> dict[str, Any]:
    row = _parse(line, path)
    has_non_finite = any(f'"{name}"' in line for name in NON_FINITE)
    return _map_numbers(row, _from_json) if has_non_finite else row


def _parse(line: str, path: Path) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: the line {line[:60]!r} is not JSON ({error.msg}); remove it by hand"
        ) from error
    return row


def _map_numbers(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {name: _map_numbers(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_numbers(item, change) for item in value]
    return change(value)


def to_json(value: Any) -> Any:
    """A number that is not finite as the string that stands for it in JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _from_json(value: Any) -> Any:
    return NON_FINITE.get(value, value) if isinstance(value, str) else value
