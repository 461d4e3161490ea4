"""How long each process works at a stage of a run, and how fast: DIR/metrics.jsonl.

Each process has a file of its own in DIR/work/rates, to which it adds a row every now and then. So
any number of machines can write, and a kill loses little of what was counted. At the end of the
run all rows are joined, and behind them stand the totals, a row for each stage.
"""

import json
import math
import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from data_pipeline.ticking import ticking

METRICS = "metrics.jsonl"
RATES = "rates"
STAGES = ("clean", "dedup", "tokenizer", "audit", "shards")
BEAT_S = 10.0
# Of the time that an attempt has taken: its rows come ever more rarely.
INTERVAL = 0.02
MB = 1e6

Row = dict[str, Any]
Counts = Mapping[str, float]
"""Of an attempt or a stage: `documents`, `bytes_in` and `bytes_out`, where they are known."""


class Attempt:
    """The work of one process at a stage, in a file that others may read meanwhile."""

    def __init__(
        self, folder: Path, stage: str, part: str, workers: int, measure: Callable[[], Counts]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{stage}-{uuid4().hex}.jsonl"
        self._workers = workers
        self._fixed: Row = {
            "data/stage": stage,
            "data/part": part,
            "data/attempt": f"process {os.getpid()} on {socket.gethostname()}",
            "data/workers": workers,
        }
        self._measure = measure
        self._counts: dict[str, float] = {}
        self._began, self._cpu_before = time.monotonic(), os.times()
        self._due_s = 0.0

    def count(self, **counts: float) -> None:
        """Say what is known of the work at its end, instead of what `measure` does."""
        self._counts |= counts

    def beat(self) -> None:
        """Tell others that this process lives, and how far it is, where that is due."""
        wall_s = time.monotonic() - self._began
        with suppress(OSError):  # a disk that is full ends the run elsewhere
            if wall_s >= self._due_s:
                self.write(is_finished=False)
                self._due_s = wall_s + max(BEAT_S, INTERVAL * wall_s)
            else:
                os.utime(self._path)

    def write(self, *, is_finished: bool) -> None:
        wall_s = time.monotonic() - self._began
        counts = {**self._measure(), **self._counts}
        counts["cpu_s"] = self._cpu_s(counts.get("cpu_s", 0.0))
        row = self._fixed | {
            "data/time": round(time.time(), 1),
            "data/finished": int(is_finished),
            "data/wall_s": round(wall_s, 2),
            **{f"data/{name}": round(value, 4) for name, value in counts.items()},
            **_speeds(counts, wall_s, wall_s * self._workers),
        }
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _cpu_s(self, of_workers: float) -> float:
        """Of this process and its workers: those it has waited for, or those that are known of."""
        now, before = os.times(), self._cpu_before
        own = now.user - before.user + now.system - before.system
        children = now.children_user - before.children_user
        children += now.children_system - before.children_system
        return own + max(children, of_workers)


@contextmanager
def timed(
    folder: Path,
    stage: str,
    *,
    workers: int,
    part: str = "1/1",
    measure: Callable[[], Counts] = dict,
) -> Iterator[Attempt]:
    """Write down how long a stage takes.

    Args:
        folder: DIR/work/rates.
        part: which one of how many this process does.
        measure: what has been done so far, called from another thread: `Counts`, the `share` of the
            work, and `cpu_s` of workers, which may be at work still or on other machines.
    """
    attempt = Attempt(folder, stage, part, workers, measure)
    attempt.beat()
    is_finished = False
    try:
        with ticking(attempt.beat, BEAT_S):
            yield attempt
        is_finished = True
    finally:
        # No beat may come behind it: the last row is the one that counts.
        with suppress(OSError):
            attempt.write(is_finished=is_finished)


def read_attempts(folder: Path, fresh_s: float = math.inf) -> list[tuple[Row, float]]:
    """The newest row of each attempt, and how many seconds ago it was heard of.

    Args:
        fresh_s: an attempt that was not heard of for so long is left out, and not read.
    """
    found, paths = [], []
    with suppress(FileNotFoundError):  # removed since
        paths = sorted(folder.glob("*.jsonl"))
    for path in paths:
        with suppress(OSError, IndexError):
            age_s = max(0.0, time.time() - path.stat().st_mtime)
            if age_s < fresh_s:
                found.append((_rows(path)[-1], age_s))
    return found


def save_metrics(out: Path, volumes: Mapping[str, Counts]) -> list[Row]:
    """Join the rows of all attempts in DIR/metrics.jsonl, with the totals behind them.

    Args:
        volumes: of each stage what went through it, each document once.

    Returns:
        The totals.
    """
    files = [_rows(path) for path in sorted((out / "work" / RATES).glob("*.jsonl"))]
    rows = sorted((row for file in files for row in file), key=lambda row: float(row["data/time"]))
    totals = _totals([file[-1] for file in files if file], volumes)
    aside = out / f".{METRICS}"
    aside.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *totals]))
    aside.rename(out / METRICS)
    return totals


def read_totals(out: Path) -> list[Row]:
    """The totals of a finished run; none where it has no metrics."""
    path = out / METRICS
    rows = _rows(path) if path.exists() else []
    return [row for row in rows if "data/attempts" in row]


def remove_metrics(out: Path) -> None:
    (out / METRICS).unlink(missing_ok=True)


def _totals(attempts: Sequence[Row], volumes: Mapping[str, Counts]) -> list[Row]:
    by_stage: defaultdict[str, list[Row]] = defaultdict(list)
    for row in attempts:
        by_stage[row["data/stage"]].append(row)
    present = [stage for stage in STAGES if stage in by_stage]
    return [_total(stage, by_stage[stage], volumes.get(stage, {})) for stage in present]


def _total(stage: str, attempts: Sequence[Row], volume: Counts) -> Row:
    """What went through a stage, over the time in which any of its attempts was at work."""
    spans = sorted((row["data/time"] - row["data/wall_s"], row["data/time"]) for row in attempts)
    wall_s, until = 0.0, spans[0][0]
    for begin, end in spans:
        wall_s += max(0.0, end - max(begin, until))
        until = max(until, end)
    worker_s = sum(row["data/wall_s"] * row["data/workers"] for row in attempts)
    lost_s = sum(row["data/wall_s"] for row in attempts if not row["data/finished"])
    return {
        "data/stage": stage,
        "data/time": until,
        "data/attempts": len(attempts),
        "data/wall_s": round(wall_s, 2),
        "data/cpu_s": round(sum(row.get("data/cpu_s", 0.0) for row in attempts), 2),
        "data/unfinished_s": round(lost_s, 2),
        **{f"data/{name}": value for name, value in volume.items()},
        **_speeds(volume, wall_s, worker_s),
    }


def _speeds(counts: Counts, wall_s: float, worker_s: float) -> dict[str, float]:
    """Of what is counted; none where no time has passed."""
    speeds: dict[str, float] = {}
    if wall_s <= 0:
        return speeds
    if "documents" in counts:
        speeds["data/documents_per_s"] = counts["documents"] / wall_s
        speeds["data/documents_per_s_per_worker"] = counts["documents"] / worker_s
    for name in ("in", "out"):
        if f"bytes_{name}" in counts:
            speeds[f"data/mb_{name}_per_s"] = counts[f"bytes_{name}"] / wall_s / MB
    return {name: round(value, 3) for name, value in speeds.items()}


def _rows(path: Path) -> list[Row]:
    """The whole rows of a file: a killed process may have written a half."""
    rows = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows
