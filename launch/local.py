"""Start the ranks of a run on this machine and watch over them."""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from pretrain.errors import LOST_RANK, STOPPED_ON_REQUEST
from pretrain.run_dir import ATTEMPT_VARIABLE, RunDirectory

PIDS = "pids.json"
POLL_S = 0.1
# Long enough for the slowest thing a stopping rank does: a last checkpoint, W&B's last rows.
GRACE_S = 120.0
# How long the ranks that fail together take to be seen.
SETTLE_S = 1.0
# How long the others take to find out who was killed, and in which collective (parallel.lost_rank).
DIAGNOSIS_S = 15.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

Rank = subprocess.Popen[bytes]


def run_ranks(run: RunDirectory, nproc: int) -> int:
    """Run `pretrain.train` on `nproc` ranks to its end; rank 0's log is shown as it grows.

    SIGTERM, SIGINT and SIGUSR2 are passed on as a request to save and stop; a second SIGINT ends
    the ranks at once. When a rank fails, the others are ended and the failed one's log is named.

    Returns:
        The exit code: 0, or that of the rank that failed first (1 if it was killed).
    """
    number = run.new_attempt()
    attempt = run.folder_of(number)
    logs = [attempt / f"rank-{rank}.log" for rank in range(nproc)]
    port = free_port()
    ranks: list[Rank] = []
    with _passing_on_stop_signals(ranks):
        os.environ[ATTEMPT_VARIABLE] = str(number)
        ranks += [_start_rank(run, rank, nproc, port, log) for rank, log in enumerate(logs)]
        (attempt / PIDS).write_text(json.dumps([rank.pid for rank in ranks]) + "\n")
        with _Screen(logs[0]) as screen:
            failed = _wait(ranks, screen)
            _end(ranks, screen)
    return 0 if failed is None else _explain(failed, ranks, logs)


def rank_pids(run: RunDirectory) -> list[int]:
    """The process ids of the ranks of the newest attempt."""
    newest = max(run.attempts.iterdir())
    pids: list[int] = json.loads((newest / PIDS).read_text())
    return pids


def rank_environment(rank: int, nproc: int, port: int) -> dict[str, str]:
    """What a rank on this machine needs to know, added to the environment of this process."""
    threads = max(1, (os.cpu_count() or 1) // nproc)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # Ranks share the cores; more threads than cores slow every rank down.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        # Threads that spin while they wait make a step many times slower on a busy machine.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _start_rank(run: RunDirectory, rank: int, nproc: int, port: int, log: Path) -> Rank:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "pretrain.train", str(run.root)],
            env=os.environ | rank_environment(rank, nproc, port),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            # Signals from a terminal reach this process alone, which passes them on.
            start_new_session=True,
            preexec_fn=_in_rank_before_it_starts,
        )


def _in_rank_before_it_starts() -> None:
    # A request to stop waits until the rank can answer it (pretrain.signals).
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    # A rank whose launcher was killed saves and stops.
    signal_when_parent_dies(signal.SIGTERM)


def signal_when_parent_dies(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when the one that started it is gone."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)


@contextmanager
def _passing_on_stop_signals(ranks: list[Rank]) -> Iterator[None]:
    interrupts = 0

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        for rank in ranks:
            rank.send_signal(signal.SIGKILL if interrupts > 1 else signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Screen:
    """Shows a log as it grows; on a terminal, with a bar for the steps."""

    def __init__(self, log: Path) -> None:
        self._log = log.open()
        self._console = Console(soft_wrap=True, highlight=False, markup=False)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=self._console, transient=True)
        self._steps = self._bars.add_task("steps", total=None, visible=False)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.refresh()
        self._bars.stop()
        self._log.close()

    def refresh(self) -> None:
        text = self._log.read()
        if not text:
            return
        self._console.out(text, end="")
        if steps := re.findall(r"^step (\d+)/(\d+)", text, re.MULTILINE):
            done, total = map(int, steps[-1])
            self._bars.update(self._steps, completed=done, total=total, visible=True)


def _wait(ranks: list[Rank], screen: _Screen) -> int | None:
    """The rank that failed, or None once all have succeeded."""
    while True:
        codes = [rank.poll() for rank in ranks]
        screen.refresh()
        if any(codes):
            return _to_blame(_settle(ranks))
        if all(code == 0 for code in codes):
            return None
        time.sleep(POLL_S)


def _settle(ranks: list[Rank]) -> list[int | None]:
    """The exit codes, once the ranks that fail together have done so."""
    began = time.monotonic()
    while True:
        codes = [rank.poll() for rank in ranks]
        is_diagnosed = LOST_RANK in codes or not any(code and code < 0 for code in codes)
        if None not in codes or time.monotonic() - began > (
            SETTLE_S if is_diagnosed else DIAGNOSIS_S
        ):
            return codes
        time.sleep(POLL_S)


def _to_blame(codes: list[int | None]) -> int:
    """The rank whose failure explains the others': killed, else mistaken, else failed."""

    def rank_order(rank: int) -> int:
        code = codes[rank]
        if not code or code == LOST_RANK:
            return 4
        # NCCL's watchdog aborts a rank that misses another.
        if code == -signal.SIGABRT:
            return 3
        return 0 if code < 0 else 2 if code == STOPPED_ON_REQUEST else 1

    return min(range(len(codes)), key=rank_order)


def _end(ranks: list[Rank], screen: _Screen) -> None:
    """Give ranks that are stopping a moment, then end what is left."""
    deadline = time.monotonic() + GRACE_S
    stopping = any(rank.returncode == STOPPED_ON_REQUEST for rank in ranks)
    while stopping and time.monotonic() < deadline and any(r.poll() is None for r in ranks):
        screen.refresh()
        time.sleep(POLL_S)
    for rank in ranks:
        rank.kill()
        rank.wait()


def _explain(failed: int, ranks: list[Rank], logs: list[Path]) -> int:
    """Say which rank failed and why; returns the exit code of the run."""
    code = ranks[failed].returncode
    if code == STOPPED_ON_REQUEST:
        print("stopped on request; everything is saved, the same command goes on from here")
        return code
    if code == LOST_RANK:
        print(f"the job lost a rank; the logs: {logs[failed].parent}", file=sys.stderr)
    else:
        how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
        print(f"rank {failed} {how}; its log: {logs[failed]}", file=sys.stderr)
    survivors = [rank for rank, process in enumerate(ranks) if process.returncode == LOST_RANK]
    # The log of rank 0 has been shown.
    if failed != 0 and code != LOST_RANK:
        sys.stderr.write("".join(_tail(logs[failed], 20)))
    if survivors and 0 not in survivors:
        sys.stderr.write("".join(_tail(logs[survivors[0]], 1)))
    return 1 if code < 0 or code == LOST_RANK else code


def _tail(log: Path, lines: int) -> list[str]:
    return log.read_text(errors="replace").splitlines(True)[-lines:]
