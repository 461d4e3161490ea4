"""Run a benchmark on ranks of this machine."""

import os
import subprocess
import sys

from launch.local import free_port, rank_environment


def run_on_ranks(nproc: int, module: str, *arguments: str) -> int:
    """`python -m module` on ranks of one thread each; returns the highest exit code."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | rank_environment(rank, nproc, port),
        )
        for rank in range(nproc)
    ]
    try:
        return max(abs(rank.wait()) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
