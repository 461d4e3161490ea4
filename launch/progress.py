"""How far long work has come: bars on a terminal, a few plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_LINES_PER_STAGE = 10
# A line that is not due yet is printed all the same after so long a silence.
SILENCE_S = 60.0


class Show(Protocol):
    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """
        Args:
            done: parts of the stage.
            total: all its parts.
            detail: more that a person wants to know, such as how fast it is.
        """


@contextmanager
def show_progress(console: Console) -> Iterator[Show]:
    if not console.is_terminal:
        yield _PlainLines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    detail_column = TextColumn("{task.fields[detail]}")
    with Progress(*columns, TimeElapsedColumn(), detail_column, console=console) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int, detail: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, detail=detail)
            bars.update(tasks[stage], completed=done, detail=detail)

        yield show


class _PlainLines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: tuple[str, int] | None = None
        self._printed_at = 0.0

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        every = max(1, total // PLAIN_LINES_PER_STAGE)
        is_due = (stage, done) != self._last and (done == total or done % every == 0)
        now = time.monotonic()
        if is_due or (detail and now - self._printed_at > SILENCE_S):
            self._last, self._printed_at = (stage, done), now
            more = f", {detail}" if detail else ""
            self._console.out(f"{stage}: {done} of {total}{more}", highlight=False)
