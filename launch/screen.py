"""What the launcher of this machine shows while ranks train: the log of rank 0 as it grows.

On a terminal a panel stands below it, with the newest of the run. There the lines of single steps
are left out: the panel says the same, and the log in the run directory has them.
"""

import os
import re
import sys
import time
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console
from rich.live import Live

from launch.local import StopSignals
from launch.panel import Panel
from pretrain.run_dir import RunDirectory

# As pretrain.metrics.sinks.step_line begins.
STEP_LINE = re.compile(r"step \d+/\d+  loss ")
EVENT_LINE = re.compile(r"warning: |phase \d+ from step ")
REDRAW_S = 1.0


class Screen(Protocol):
    """Shows one attempt after the other."""

    def show(self, attempt: int, log: Path) -> None:
        """
        Args:
            log: of rank 0.
        """

    def refresh(self) -> None: ...

    def close(self) -> None:
        """Show what is left of an attempt that has ended; a second time it does nothing."""


def screen_of(run: RunDirectory, stop: StopSignals, plain: bool) -> Screen:
    """
    Args:
        plain: never a panel.
    """
    return LiveScreen(run, stop) if not plain and takes_a_panel(sys.stdout) else PlainScreen()


def takes_a_panel(file: TextIO) -> bool:
    """Whether somebody looks at it on a terminal that can move its cursor."""
    is_calm = os.environ.get("TERM", "dumb") in ("dumb", "unknown") or "CI" in os.environ
    return not is_calm and file.isatty() and file.encoding.lower().startswith("utf")


class PlainScreen:
    """Prints the log as it is."""

    def __init__(self) -> None:
        self._log: TextIO | None = None

    def show(self, attempt: int, log: Path) -> None:
        self._log = log.open(errors="replace")

    def refresh(self) -> None:
        if self._log is not None and (text := self._log.read()):
            print(text, end="", flush=True)

    def close(self) -> None:
        self.refresh()
        if self._log is not None:
            self._log.close()
            self._log = None


class LiveScreen:
    """Prints the lines of the log above a panel; what this process prints meanwhile goes there too.

    It draws in the thread of its caller: one of its own would meet the signals that stop a run.
    """

    def __init__(self, run: RunDirectory, stop: StopSignals) -> None:
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._panel = Panel(run)
        self._stop, self._has_told_of_stop = stop, False
        self._log: TextIO | None = None
        self._rest = ""
        self._live: Live | None = None
        self._drawn = 0.0

    def show(self, attempt: int, log: Path) -> None:
        self._log, self._rest = log.open(errors="replace"), ""
        self._panel.begin(attempt)
        self._has_told_of_stop = False
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            # What goes into a file has to arrive there.
            redirect_stderr=sys.stderr.isatty(),
        )
        self._live.start()
        self._draw()

    def refresh(self) -> None:
        if self._live is None or self._log is None:
            return
        self._print(self._log.read())
        if self._stop.requested and not self._has_told_of_stop:
            self._has_told_of_stop = True
            self._panel.stopping()
            self._drawn = 0.0
        if self._panel.look() or time.monotonic() - self._drawn > REDRAW_S:
            self._draw()

    def close(self) -> None:
        if self._live is None or self._log is None:
            return
        self._print(self._log.read())
        if self._rest:
            self._print("\n")
        self._panel.end()
        self._draw()
        self._live.stop()
        self._log.close()
        self._live = self._log = None

    def _print(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if EVENT_LINE.match(line):
                self._panel.note(line)
        # At once, as each print draws the panel anew.
        if shown := [line for line in lines if not STEP_LINE.match(line)]:
            self._console.out("\n".join(shown))

    def _draw(self) -> None:
        assert self._live is not None
        self._drawn = time.monotonic()
        size = self._console.size
        self._live.update(self._panel.render(size.width, size.height), refresh=True)
