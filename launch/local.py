"""What ranks on this machine need: their environment, and the signals that ask them to stop."""

import ctypes
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from random import SystemRandom
from types import FrameType, TracebackType
from typing import Self

from pretrain.run_dir import RunDirectory

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
PIDS = "pids.json"
LOOPBACK = "127.0.0.1"
# Below the ports that Linux gives to connections (32768 to 60999): one of those may be taken
# between its choice and its use.
PORTS = range(20000, 32768)

Rank = subprocess.Popen[bytes]


def note_pids(attempt: Path, pids: Sequence[int]) -> None:
    (attempt / PIDS).write_text(json.dumps(pids) + "\n")


def rank_pids(run: RunDirectory) -> list[int]:
    """The process ids of the ranks of the newest attempt."""
    newest = max(run.attempts.iterdir())
    pids: list[int] = json.loads((newest / PIDS).read_text())
    return pids


def end_ranks(ranks: Sequence[Rank], patience_s: float) -> list[int]:
    """Kill `ranks`, all of them before one is waited for.

    Returns:
        The process ids of those that have not ended after `patience_s`: the kernel keeps a process
        that waits for a device or a file system, such as NFS without its server.
    """
    for rank in ranks:
        rank.kill()
    deadline = time.monotonic() + patience_s
    for rank in ranks:
        with suppress(subprocess.TimeoutExpired):
            rank.wait(timeout=max(0.0, deadline - time.monotonic()))
    return [rank.pid for rank in ranks if rank.poll() is None]


def rank_environment(rank: int, nproc: int, port: int) -> dict[str, str]:
    """What a rank on this machine needs to know, added to the environment of this process."""
    # A rank that starts imports this module before it can keep a request to stop.
    from launch.environment import environment_of_ranks

    variables = environment_of_ranks(ranks=nproc, ranks_here=nproc, address=LOOPBACK, port=port)
    return {one.name: one.value for one in variables} | own_environment(rank)


def own_environment(rank: int) -> dict[str, str]:
    """What differs between the ranks of this machine."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def free_port() -> int:
    """One of `PORTS`, drawn, as others on this machine may look for one at the same time."""
    return next(filter(is_free, SystemRandom().sample(PORTS, len(PORTS))))


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def signal_when_parent_dies(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when the one that started it is gone."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)


class StopSignals:
    """Inside it, SIGTERM, SIGINT and SIGUSR2 ask the ranks to save and stop; after it, nothing.

    A second SIGINT ends them at once. What comes while there are no ranks, before the first attempt
    or between two, is passed on to the next ones.

    Attributes:
        requested: whether a signal has come.
        at_once: whether the ranks were ended at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self.at_once = False
        self._interrupted = False
        self._ranks: Sequence[Rank] = ()

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        # All is over but the end of the interpreter, which another request must not disturb.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def pass_on_to(self, ranks: Sequence[Rank]) -> None:
        """From now on the requests go to these ranks."""
        self._ranks = ranks
        if self.requested:
            self._pass_on()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.at_once |= self._interrupted and number == signal.SIGINT
        self._interrupted |= number == signal.SIGINT
        self.requested = True
        self._pass_on()

    def _pass_on(self) -> None:
        for rank in self._ranks:
            rank.send_signal(signal.SIGKILL if self.at_once else signal.SIGTERM)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Processes and threads that are started meanwhile have the signals that stop blocked.

    A request that reaches a process early waits until it can answer (pretrain.signals).
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
