"""Run a module on ranks of this machine and take the one JSON object that rank 0 prints."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import typer

from launch.local import free_port, rank_environment, signal_when_parent_dies

POLL_S = 0.1


def run_shared(module: str, arguments: Sequence[str], nproc: int) -> dict[str, Any]:
    """`python -m module ARGUMENTS` on `nproc` ranks, which end with this process.

    Raises:
        typer.Exit: with the exit code of the first that failed; rank 0's errors have been shown.
    """
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | rank_environment(rank, nproc, port),
            stdout=subprocess.PIPE,
            # All ranks say the same.
            stderr=None if rank == 0 else subprocess.DEVNULL,
            preexec_fn=partial(signal_when_parent_dies, signal.SIGKILL),
        )
        for rank in range(nproc)
    ]
    try:
        # One that fails would be waited for by the others.
        while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
            time.sleep(POLL_S)
    finally:
        for rank in ranks:
            rank.kill()
    if failed := [code for code in codes if code]:
        raise typer.Exit(max(failed[0], 1))
    printed, _ = ranks[0].communicate()
    result: dict[str, Any] = json.loads(printed)
    return result
