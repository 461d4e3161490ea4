"""A process of a task is a copy of one with threads, and of what they hold at that moment."""

import io
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event

import pytest
from rich.console import Console

from data_pipeline.workers import call_apart
from launch.progress import show_progress
from tests.ranks import TIMEOUT_S


class _Terminal(io.StringIO):
    """A terminal that can be stopped, as over a slow line."""

    def __init__(self) -> None:
        super().__init__()
        self._goes_on, self._is_waited_for = Event(), Event()
        self._goes_on.set()

    def write(self, text: str) -> int:
        if not self._goes_on.is_set():
            self._is_waited_for.set()
            self._goes_on.wait()
        return super().write(text)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Somebody writes to it all the while."""
        self._goes_on.clear()
        assert self._is_waited_for.wait(TIMEOUT_S)
        try:
            yield
        finally:
            self._goes_on.set()


def _warn(name: str) -> None:
    signal.alarm(TIMEOUT_S)
    print(f"warning: {name}", file=sys.stderr)


def test_a_worker_warns_while_the_bars_of_a_terminal_are_drawn(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = _Terminal()
    with show_progress(Console(file=terminal, force_terminal=True)) as show:
        show("clean", 0, 1)
        with terminal.stopped():
            call_apart(_warn, "crawl.warc.gz")
        show("clean", 1, 1)
        print("warning: the command", file=sys.stderr)
    assert capfd.readouterr().err == "warning: crawl.warc.gz\n"
    assert "warning: the command\n" in terminal.getvalue()
