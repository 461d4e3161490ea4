"""How far long work has come: bars on a terminal, a few plain lines elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_LINES_PER_STAGE = 10

Show = Callable[[str, int, int], None]
"""Called with the name of a stage, the parts of it that are done, and all its parts."""


@contextmanager
def show_progress(console: Console) -> Iterator[Show]:
    if not console.is_terminal:
        yield lambda stage, done, total: _plain_line(console, stage, done, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield show


def _plain_line(console: Console, stage: str, done: int, total: int) -> None:
    every = max(1, total // PLAIN_LINES_PER_STAGE)
    if done == total or done % every == 0:
        console.out(f"{stage}: {done} of {total}", highlight=False)
