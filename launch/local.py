"""Start the ranks of a run on this machine and watch over them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from pretrain.run_dir import RunDirectory

PIDS = "pids.json"
POLL_S = 0.1
GRACE_S = 20.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

Rank = subprocess.Popen[bytes]


def run_ranks(run: RunDirectory, nproc: int) -> int:
    """Run `pretrain.train` on `nproc` ranks to its end; rank 0's log is shown as it grows.

    SIGTERM, SIGINT and SIGUSR2 are passed on as a request to save and stop. When a rank fails,
    the others are ended and the failed one's log is named.

    Returns:
        The exit code: 0, or that of the rank that failed first (1 if it was killed).
    """
    attempt = run.new_attempt()
    logs = [attempt / f"rank-{rank}.log" for rank in range(nproc)]
    port = free_port()
    ranks = [_start_rank(run, rank, nproc, port, log) for rank, log in enumerate(logs)]
    (attempt / PIDS).write_text(json.dumps([rank.pid for rank in ranks]) + "\n")
    with _passing_on_stop_signals(ranks), logs[0].open() as shown:
        failed = _wait(ranks, shown)
        _end(ranks)
        _show(shown)
    return 0 if failed is None else _explain(failed, ranks[failed].returncode, logs[failed])


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
        )


@contextmanager
def _passing_on_stop_signals(ranks: list[Rank]) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list[Rank], shown: TextIO) -> int | None:
    """The first rank that failed, or None once all have succeeded."""
    while True:
        codes = [rank.poll() for rank in ranks]
        _show(shown)
        for rank, code in enumerate(codes):
            if code:
                return rank
        if all(code == 0 for code in codes):
            return None
        time.sleep(POLL_S)


def _show(log: TextIO) -> None:
    sys.stdout.write(log.read())
    sys.stdout.flush()


def _end(ranks: list[Rank]) -> None:
    """Give ranks that are still saving a moment, then end what is left."""
    deadline = time.monotonic() + GRACE_S
    stopping = any(rank.returncode == 75 for rank in ranks)
    while stopping and time.monotonic() < deadline and any(r.poll() is None for r in ranks):
        time.sleep(POLL_S)
    for rank in ranks:
        rank.kill()
        rank.wait()


def _explain(rank: int, code: int, log: Path) -> int:
    if code == 75:
        print("stopped on request; everything is saved, the same command goes on from here")
        return code
    how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
    print(f"rank {rank} {how}; its log: {log}", file=sys.stderr)
    if rank != 0:
        sys.stderr.write("".join(log.read_text(errors="replace").splitlines(True)[-20:]))
    return max(code, 1)
