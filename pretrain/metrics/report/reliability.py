"""What the report says of attempts, events and lost time."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.metrics.credentials import all_without_credentials
from pretrain.metrics.report.run import Run, read_json
from pretrain.run_dir import RunDirectory

LOG_TAIL_BYTES = 4096
MOST_EVENTS = 200
ATTEMPTS_KEPT = 4096
COUNTED = {
    "guard/skipped": ("a batch was skipped", "{} batches were skipped"),
    "guard/rollbacks": ("rolled back to a checkpoint", "rolled back {} times"),
}


class TimeStep(NamedTuple):
    """A bar of the waterfall, in shares of all time."""

    label: str
    time: str
    offset: float
    share: float
    is_lost: bool


class RunTime(NamedTuple):
    name: str
    total: str
    productive: str
    steps: Sequence[TimeStep]


def lost_time(runs: Sequence[Run]) -> list[RunTime]:
    """Where the time of each run went, of those that know: productive first, then the losses."""
    return [_time_of(run) for run in runs]


def _time_of(run: Run) -> RunTime:
    productive = run.history.last("perf/productive_s")
    lost = {
        cause.replace("_", " "): float(series.value[-1])
        for cause, series in run.history.parts("perf/lost_s").items()
    }
    if productive is None or not lost:
        return RunTime(run.name, "", "", ())
    total = max(productive + sum(lost.values()), 1e-9)
    steps = [TimeStep("steps that stand", duration(productive), 0.0, productive / total, False)]
    offset = productive
    for cause, seconds in sorted(lost.items(), key=lambda item: -item[1]):
        if seconds > 0:
            share = seconds / total
            steps.append(TimeStep(cause, duration(seconds), offset / total, share, True))
            offset += seconds
    return RunTime(run.name, duration(total), duration(productive), steps)


def duration(seconds: float) -> str:
    """The two largest units: 3 h 12 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


class Event(NamedTuple):
    run: str
    step: int | None
    text: str


def events(runs: Sequence[Run]) -> list[Event]:
    """What interrupted training, in the order of steps; `farspan audit` says why."""
    found = [event for run in runs for event in (*_guarded(run), *_changed(run))]
    return sorted(found, key=lambda event: -1 if event.step is None else event.step)[-MOST_EVENTS:]


def _guarded(run: Run) -> Iterator[Event]:
    """Where the counts of the guard rise; they begin anew with each attempt."""
    for metric, (one, several) in COUNTED.items():
        series = run.history.series.get(metric)
        if series is None:
            continue
        before = np.concatenate([[0], series.value[:-1]])
        rise = np.where(series.value < before, series.value, series.value - before)
        for at in np.flatnonzero(rise > 0):
            count = int(rise[at])
            yield Event(
                run.name, int(series.step[at]), one if count == 1 else several.format(count)
            )


def _changed(run: Run) -> Iterator[Event]:
    """Settings that a later attempt had otherwise."""
    for number in run.directory.all_attempts():
        changes = run.directory.folder_of(number) / run.directory.changes.name
        for line in changes.read_text().splitlines() if changes.exists() else ():
            if change := all_without_credentials(read_json(line)):
                told = f"{change.get('setting')}: {change.get('before')} → {change.get('now')}"
                yield Event(run.name, None, f"attempt {number} changed {told}")


class Attempt(NamedTuple):
    """One start of a run; `end` is what it died of, or the last line of rank 0's log."""

    run: str
    name: str
    ranks: int
    layout: str
    started: datetime
    last_written: datetime
    end: str


def attempts(runs: Sequence[Run]) -> list[Attempt]:
    return [attempt for run in runs for attempt in _attempts(run)]


def _attempts(run: Run) -> Iterator[Attempt]:
    numbers = run.directory.all_attempts()
    for number in numbers:
        folder = run.directory.folder_of(number)
        changed = folder.stat().st_mtime_ns
        read = _attempt if number == numbers[-1] else _attempt_that_ended
        yield read(run.name, run.directory, number, changed)


def _attempt(name: str, directory: RunDirectory, number: int, changed_ns: int) -> Attempt:
    folder = directory.folder_of(number)
    logs = sorted(folder.glob("*.log"))
    changed = changed_ns / 1e9
    written = [log.stat().st_mtime for log in logs]
    known = _read(directory.ranks_of(number))
    failure = _read(directory.failure_of(number)).get("error")
    return Attempt(
        name,
        folder.name,
        known.get("ranks", len(logs)),
        _layout(known.get("layout", "")),
        datetime.fromtimestamp(min([*written, changed]), UTC),
        datetime.fromtimestamp(max(written, default=changed), UTC),
        failure or (_last_line(logs[0]) if logs else ""),
    )


# A page that follows runs asks every two seconds, and there may be thousands of logs. What is put
# into a folder later, such as what the attempt died of, changes the time of the folder.
_attempt_that_ended = lru_cache(ATTEMPTS_KEPT)(_attempt)


def _read(path: Path) -> dict[str, Any]:
    tree = read_json(path.read_text()) if path.exists() else None
    return tree if isinstance(tree, dict) else {}


def _layout(layout: str) -> str:
    """Only the axes that spread anything."""
    return " ".join(axis for axis in layout.split() if not axis.endswith("=1")) or "one rank"


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
