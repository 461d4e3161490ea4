"""What a terminal shows of a run while it trains: a panel of its newest rows, pace and events."""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO

from rich.console import Group, RenderableType
from rich.text import Text

from launch.durations import duration_text
from pretrain.config import phases_of, read_run_config
from pretrain.curriculum import tokens_until
from pretrain.run_dir import RunDirectory

Row = Mapping[str, Any]
Fact = tuple[str, str | Text]

# What is read of the rows that are there already: one of many experts has some 100 KB.
TAIL_BYTES = 4 << 20
LOSSES_KEPT = 2000
EVENTS_KEPT = 4
# The pace is that of so many rows, and of a while that a few checkpoints fit into.
RECENT_ROWS = 20
RECENT_S = 300.0
BARS = "▁▂▃▄▅▆▇█"
NOT_FINITE = "×"
LABEL_WIDTH = 10
# Some thirty years; dates end at the year 9999.
LONGEST_ETA_S = 1e9
# Two facts fit beside each other.
WIDE = 64
WIDEST = 100


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as columns between the least and the largest of them, means where there are more
    values than columns; a column with one that is not finite is a cross.
    """
    columns = min(width, len(values))
    edges = [index * len(values) // columns for index in range(columns + 1)] if columns else []
    means = [
        math.fsum(values[a:b]) / (b - a) if all(map(math.isfinite, values[a:b])) else math.nan
        for a, b in pairwise(edges)
    ]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, height = min(finite, default=0.0), max(finite, default=0.0) - min(finite, default=0.0)
    return "".join(
        BARS[round((mean - low) / height * (len(BARS) - 1)) if height else 0]
        if math.isfinite(mean)
        else NOT_FINITE
        for mean in means
    )


class MetricsTail:
    """The rows of a metrics.jsonl as they are written.

    The file may not be there yet, and another takes its place when an attempt begins or rolls back.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._rest = b""

    def read(self) -> tuple[list[Row], bool]:
        """What is new, and whether it takes the place of all rows before."""
        is_anew = self._reopen()
        try:
            read = self._file.read() if self._file else b""
        except OSError:
            # A file system that fails ends the ranks, which say so.
            read = b""
        *lines, self._rest = (self._rest + read).split(b"\n")
        rows: list[Row] = []
        for line in lines:
            # The first may be the end of one, after a disk was full another may be damaged.
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "train/step" in row:
                rows.append(row)
        return rows, is_anew

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _reopen(self) -> bool:
        """Open what has the name now; whether that is another file than before."""
        try:
            there = os.stat(self._path)
        except OSError:
            return False
        if self._file is not None and os.path.samestat(os.fstat(self._file.fileno()), there):
            return False
        try:
            file = self._path.open("rb")
        except OSError:
            return False
        is_another = self._file is not None
        self.close()
        file.seek(max(0, there.st_size - TAIL_BYTES))
        self._file, self._rest = file, b""
        return is_another


class Pace:
    """Tokens per second of late, checkpoints and all that is between steps included.

    It goes by when rows arrive; until two have, by what they say of their step.
    """

    def __init__(self) -> None:
        self._arrived: deque[tuple[float, float]] = deque()
        self._said: deque[float] = deque(maxlen=RECENT_ROWS)

    def forget(self) -> None:
        self._arrived.clear()
        self._said.clear()

    def add(self, row: Row, now: float | None) -> None:
        """
        Args:
            now: in seconds; None for a row that was there before somebody looked.
        """
        self._said.append(number(row, "perf/tokens_per_s"))
        if now is None:
            return
        self._arrived.append((now, number(row, "train/tokens")))
        while len(self._arrived) > RECENT_ROWS and now - self._arrived[0][0] > RECENT_S:
            self._arrived.popleft()

    def tokens_per_s(self) -> float:
        """NaN where nothing is known."""
        if len(self._arrived) > 1:
            (began, first), (ended, last) = self._arrived[0], self._arrived[-1]
            # Rows that come together say nothing.
            if ended - began > 1:
                return (last - first) / (ended - began)
        return median(self._said) if self._said else math.nan


class Panel:
    """The newest that is known of a run.

    Args:
        clock: seconds that never go back.
        wall: the time of day.
    """

    def __init__(
        self,
        run: RunDirectory,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = datetime.now,
    ) -> None:
        config = read_run_config(run)
        self._run = run
        self._steps, self._phases = config.train.steps, phases_of(config)
        self._clock, self._wall = clock, wall
        self._tail = MetricsTail(run.metrics)
        self._pace = Pace()
        self._losses: deque[tuple[int, float]] = deque(maxlen=LOSSES_KEPT)
        self._row: Row = {}
        self._row_at: float | None = None
        self._began = self._clock()
        self._attempt, self._state = 0, ""
        self._events: deque[tuple[str, str]] = deque(maxlen=EVENTS_KEPT)
        self._saved = self._saved_marker()
        self._saw_rows(is_first=True)

    def begin(self, attempt: int) -> None:
        """An attempt has been started."""
        self._attempt, self._state = attempt, "starting"
        self._began, self._row_at = self._clock(), None
        self._pace.forget()
        self.note(f"attempt {attempt} starts")

    def end(self) -> None:
        """The attempt is over."""
        self.look()
        self._state = "done" if self._step == self._steps else "ended"
        if self._state == "ended":
            self.note(f"attempt {self._attempt} ends after step {self._step:,}")

    def note(self, event: str) -> None:
        self._events.append((f"{self._wall():%H:%M:%S}", event))

    def stopping(self) -> None:
        """Somebody has asked it to stop."""
        self._state = "stopping"
        self.note("asked to save and stop; ctrl-C again ends it at once")

    def look(self) -> bool:
        """See what has been logged and saved; whether there was something new."""
        saved = self._saved_marker()
        is_saved = saved != self._saved and saved is not None
        self._saved = saved
        if saved and is_saved:
            self.note(f"checkpoint of step {saved[0]:,}")
        return self._saw_rows() or is_saved

    def _saw_rows(self, is_first: bool = False) -> bool:
        rows, is_anew = self._tail.read()
        if is_anew:
            self._losses.clear()
            self._pace.forget()
            self._row, self._row_at = {}, None
        # What was there before has come at no time that is known.
        now = None if is_anew or is_first else self._clock()
        for row in rows:
            self._losses.append((int(row["train/step"]), number(row, "train/loss")))
            self._pace.add(row, now)
        if rows:
            self._row = rows[-1]
        if rows and now is not None:
            self._row_at = now
            if self._state == "starting":
                self._state = "training"
        return bool(rows)

    def _saved_marker(self) -> tuple[int, float] | None:
        """The step of the newest checkpoint, and when it was saved, in seconds since the epoch."""
        try:
            step = json.loads(self._run.saved.read_text())["step"]
            return int(step), self._run.saved.stat().st_mtime
        except (OSError, ValueError, KeyError):
            return None

    def render(self, width: int, height: int) -> RenderableType:
        """
        Args:
            width: in columns, of the terminal.
            height: in lines.
        """
        # What the terminal itself prints, such as ^C, has to fit beside it.
        width = max(LABEL_WIDTH + 1, min(width - 3, WIDEST))
        by_line = 2 if width >= WIDE else 1
        facts = self._facts()
        lines = [facts[i : i + by_line] for i in range(0, len(facts), by_line)]
        shown = max(0, height - len(lines) - 4)
        return Group(
            self._heading(width),
            _line([("step", self._bar(width - LABEL_WIDTH))], width),
            _line([("loss", self._curve(width - LABEL_WIDTH))], width),
            *(_line(line, width) for line in lines),
            *(
                _line([(at, Text(event, "yellow" * event.startswith("warning")))], width)
                for at, event in (list(self._events)[-shown:] if shown else ())
            ),
        )

    def _heading(self, width: int) -> Text:
        elapsed = duration_text(self._clock() - self._began)
        title = f"{self._run.root.name}, attempt {self._attempt}, {self._state}, {elapsed} "
        line = Text.assemble((title, "bold"), ("─" * (width - len(title)), "dim"))
        return _fitted(line, width)

    @property
    def _step(self) -> int:
        return int(self._row.get("train/step", 0))

    def _bar(self, width: int) -> Text:
        share = min(1.0, self._step / self._steps)
        counted, percent = f"{self._step:,} of {self._steps:,} ", f" {math.floor(100 * share)} %"
        room = max(0, width - len(counted) - len(percent))
        done = int(room * share)
        return Text.assemble(counted, ("━" * done, "green"), ("─" * (room - done), "dim"), percent)

    def _curve(self, width: int) -> str | Text:
        if not self._losses:
            return "nothing is logged yet"
        loss = self._losses[-1][1]
        shown = f"{loss:.4f} "
        curve = sparkline([loss for _, loss in self._losses], width - len(shown))
        return Text.assemble((shown, "" if math.isfinite(loss) else "bold red"), (curve, "cyan"))

    def _facts(self) -> list[Fact]:
        row = self._row
        facts: list[Fact] = [("tokens/s", _shown(row, "perf/tokens_per_s", ",.0f"))]
        if "perf/mfu" in row:
            facts.append(("MFU", _shown(row, "perf/mfu", ".1%")))
        else:
            facts.append(("TFLOP/s", _shown(row, "perf/tflops_per_device", ".3g")))
        facts += [
            ("lr", _shown(row, "train/lr", ".2e")),
            ("grad norm", _shown(row, "train/grad_norm", ".3f")),
            ("ETA", self._eta()),
            ("saved", self._last_checkpoint()),
        ]
        skipped, rollbacks = row.get("guard/skipped", 0), row.get("guard/rollbacks", 0)
        if skipped or rollbacks:
            facts.append(("guard", f"batches skipped: {skipped}, rollbacks: {rollbacks}"))
        return facts

    def _eta(self) -> str:
        left = self.remaining_s()
        if left is None or left > LONGEST_ETA_S:
            return "-"
        at = self._wall() + timedelta(seconds=left)
        return f"in {duration_text(left)} ({at:%H:%M})" if left < 86400 else f"{at:%Y-%m-%d %H:%M}"

    def remaining_s(self) -> float | None:
        """Seconds until the last step, at the pace of late; None while nothing is known."""
        tokens_per_s = self._pace.tokens_per_s()
        if self._state in ("", "ended", "done") or self._row_at is None or not tokens_per_s > 0:
            return None
        # Steps of other phases have other lengths.
        tokens = tokens_until(self._phases, self._steps) - tokens_until(self._phases, self._step)
        return max(0.0, tokens / tokens_per_s - (self._clock() - self._row_at))

    def _last_checkpoint(self) -> str:
        if self._saved is None:
            return "no checkpoint yet"
        step, at = self._saved
        return f"step {step:,}, {duration_text(max(0.0, self._wall().timestamp() - at))} ago"


def number(row: Row, name: str) -> float:
    """Also of one that JSON cannot tell; NaN where there is none."""
    value = row.get(name, math.nan)
    return float(value) if isinstance(value, int | float | str) else math.nan


def _shown(row: Row, name: str, form: str) -> str | Text:
    if name not in row:
        return "-"
    value = number(row, name)
    return Text(format(value, form), "" if math.isfinite(value) else "bold red")


def _line(facts: Sequence[Fact], width: int) -> Text:
    """Facts beside each other, as many columns for each."""
    cells = []
    for label, value in facts:
        cell = Text.assemble((f"{label:<{LABEL_WIDTH}}", "dim"), value)
        cells.append(_fitted(cell, width // len(facts)))
    line = Text.assemble(*cells, no_wrap=True, overflow="ellipsis")
    # A terminal that gets narrower would wrap the spaces.
    line.rstrip()
    return line


def _fitted(text: Text, width: int) -> Text:
    text.truncate(width, overflow="ellipsis", pad=True)
    return text
