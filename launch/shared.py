"""Run a module on ranks of this machine and take the one JSON object that rank 0 prints."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer

from launch.local import Rank, free_port, rank_environment, signal_when_parent_dies
from pretrain.errors import LOST_RANK

POLL_S = 0.1
# How long ranks that fail together, or notice that another did, may take to say so.
SETTLE_S = 5.0
# Of what a rank other than the first has said.
LINES_AT_MOST = 20


def run_shared(module: str, arguments: Sequence[str], nproc: int) -> dict[str, Any]:
    """`python -m module ARGUMENTS` on `nproc` ranks, which end with this process.

    Raises:
        typer.Exit: a rank has failed, and which one and why has been told. Its code is that rank's;
            1 if it was killed or lost.
    """
    with TemporaryDirectory(prefix="farspan-") as folder:
        outputs = [Path(folder) / f"rank-{rank}" for rank in range(nproc)]
        codes = _run(module, arguments, outputs)
        if any(codes):
            raise typer.Exit(_explain(codes, outputs))
        result: dict[str, Any] = json.loads(outputs[0].read_text())
    return result


def _run(module: str, arguments: Sequence[str], outputs: Sequence[Path]) -> list[int | None]:
    """Exit codes of the ranks when all have ended, or one has failed; None for those still alive.

    Args:
        outputs: rank 0's standard output goes to the first; all that another one says to its own.
    """
    port, nproc = free_port(), len(outputs)
    ranks: list[Rank] = []
    try:
        for rank, output in enumerate(outputs):
            with output.open("wb") as file:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, *arguments],
                        env=os.environ | rank_environment(rank, nproc, port),
                        stdout=file,
                        # Most of the time all ranks say the same.
                        stderr=None if rank == 0 else file,
                        preexec_fn=partial(_prepare_rank, os.getpid()),
                    )
                )
        return _wait(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _prepare_rank(launcher: int) -> None:
    # A terminal sends ctrl-C to all; the ranks end with this process, and say nothing.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal_when_parent_dies(signal.SIGKILL)
    if os.getppid() != launcher:  # it was gone before
        os._exit(1)


def _wait(ranks: Sequence[Rank]) -> list[int | None]:
    deadline = None
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [code for code in codes if code]
        # Who was killed is known; the others need not find out.
        if None not in codes or any(code < 0 for code in failed):
            return codes
        if failed:
            deadline = deadline or time.monotonic() + SETTLE_S
            if time.monotonic() > deadline:
                return codes
        time.sleep(POLL_S)


def _explain(codes: Sequence[int | None], outputs: Sequence[Path]) -> int:
    """Say which rank is to blame, and what of it has not been shown. Returns the exit code."""
    failed = min((rank for rank, code in enumerate(codes) if code), key=partial(_order, codes))
    code = codes[failed] or 1
    if code < 0:
        name = signal.Signals(-code).name
        print(
            f"error: rank {failed} of {len(codes)} was killed by signal {-code} ({name}); the "
            "others were ended",
            file=sys.stderr,
        )
    elif failed:
        said = outputs[failed].read_text(errors="replace").splitlines()
        if code == LOST_RANK:
            print(*said[-1:], sep="\n", file=sys.stderr)
        else:
            print(
                f"error: rank {failed} of {len(codes)} failed with exit code {code}:",
                file=sys.stderr,
            )
            print(*said[-LINES_AT_MOST:], sep="\n", file=sys.stderr)
    return 1 if code < 0 or code == LOST_RANK else code


def _order(codes: Sequence[int | None], rank: int) -> tuple[bool, bool, int]:
    """Who was killed comes first, who has only lost another last; of equals the first."""
    code = codes[rank] or 0
    return code > 0, code == LOST_RANK, rank
