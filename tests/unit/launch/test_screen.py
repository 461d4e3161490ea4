"""A launcher on a real terminal, whose ranks are scripts."""

import fcntl
import json
import os
import re
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.config import load_config
from pretrain.errors import STOPPED_ON_REQUEST
from pretrain.metrics.sinks import step_line
from pretrain.run_dir import RunDirectory
from tests.ranks import ROOT, TIMEOUT_S

LAUNCHER = """
import sys
from pathlib import Path
from launch.agent import run_ranks
from launch.local import StopSignals
from pretrain.run_dir import RunDirectory

root, rank, plain = sys.argv[1], sys.argv[2:-1], sys.argv[-1] == "plain"
with StopSignals() as stop:
    code, _ = run_ranks(RunDirectory(Path(root)), [sys.executable, *rank, root], 1, 0, stop, plain)
print("over and out", flush=True)
sys.exit(code)
"""
# It logs a step, and stops on request.
RANK = """
import signal, sys, threading
asked = threading.Event()
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: asked.set())
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
line, row, root = sys.argv[1:]
with open(root + "/metrics.jsonl", "a") as metrics:
    metrics.write(row + chr(10))
print("kernels: none of them", line, "warning: a spike", "x" * 300 + "y", sep=chr(10), flush=True)
asked.wait()
print("saved what there was", end="", flush=True)
sys.exit(75)
"""
ROW = {
    "train/step": 25,
    "train/tokens": 25_000,
    "train/loss": 4.5678,
    "train/grad_norm": 0.5,
    "train/lr": 1e-3,
    "perf/tokens_per_s": 1234.0,
}
# From its heading to an event, no line as long as 40.
NARROW_PANEL = r"run, attempt 1[^\n]{1,25}\n(?:[^\n]{1,39}\n)+[^\n]{,13}warning: a spike"
HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.root.mkdir()
    run.config.write_text(load_config("tiny", ["train.steps=100"]).to_yaml())
    return run


class Terminal:
    """A terminal that a launcher runs on, and what it has printed."""

    def __init__(self, run: RunDirectory, *more: str) -> None:
        self._end, terminal = os.openpty()
        self.resize(80)
        environment = os.environ | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
        for name in ("CI", "COLUMNS", "LINES", "NO_COLOR", "PYTHONIOENCODING"):
            environment.pop(name, None)
        arguments = (str(run.root), "-c", RANK, step_line(ROW, 100), json.dumps(ROW), *more)
        self.launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, *(arguments if more else (*arguments, "live"))],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(terminal)
        self.printed = b""

    def resize(self, width: int) -> None:
        fcntl.ioctl(self._end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self._end, keys)

    def read(self, *until: str) -> str:
        """What is printed from now on, without colours, until it has these patterns or the end."""
        text = b""
        while not until or not all(re.search(pattern, plain(text)) for pattern in until):
            assert select.select([self._end], [], [], TIMEOUT_S)[0], plain(text)
            try:
                text += os.read(self._end, 1 << 16)
            except OSError:
                assert not until, plain(text)
                break
        self.printed += text
        return plain(text)

    def close(self) -> None:
        self.launcher.kill()
        self.launcher.wait()
        os.close(self._end)


def plain(text: bytes) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text.decode(errors="ignore"))


@pytest.fixture
def terminal(run: RunDirectory) -> Iterator[Terminal]:
    terminal = Terminal(run)
    yield terminal
    terminal.close()


def test_a_terminal_shows_every_line_above_a_panel_that_ctrl_c_ends_in_order(
    terminal: Terminal, run: RunDirectory
) -> None:
    shown = terminal.read("attempt 1, training", "25 of 100", "x{300}y\n")
    for line in ("kernels: none of them", "warning: a spike", "x" * 300 + "y"):
        assert f"{line}\n" in shown
    assert "  loss 4.5678" not in shown
    terminal.resize(40)
    terminal.read(NARROW_PANEL)
    terminal.type(b"\x03")
    assert terminal.launcher.wait(TIMEOUT_S) == STOPPED_ON_REQUEST
    end = terminal.read()
    assert "asked to save and stop" in end
    assert "saved what there was\n" in end
    assert end.rstrip().endswith("over and out")
    assert "stopped on request; everything is saved" in end
    assert terminal.printed.rindex(SHOW) > terminal.printed.rindex(HIDE)
    assert step_line(ROW, 100) in (run.folder_of(1) / "rank-0.log").read_text()


@pytest.mark.slow
def test_plain_shows_the_log_alone(run: RunDirectory) -> None:
    terminal = Terminal(run, "plain")
    try:
        assert f"{step_line(ROW, 100)}\n" in terminal.read("y\n")
        terminal.type(b"\x03")
        end = terminal.read()
    finally:
        terminal.close()
    assert "saved what there was" in end
    assert b"\x1b" not in terminal.printed
