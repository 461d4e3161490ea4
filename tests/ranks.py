"""Run a script on N gloo ranks inside a test."""

import os
import subprocess
import sys
from pathlib import Path

from launch.local import free_port, rank_environment

ROOT = Path(__file__).resolve().parents[1]
RUN_RANK = Path(__file__).with_name("run_rank.py")
# Against hanging for ever: a busy machine may take ten times as long as a quiet one.
TIMEOUT_S = 1200


def run_on_ranks(nproc: int, script: Path, *arguments: str) -> None:
    """Run `script` on ranks of this machine; fail with the output of a rank that fails."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RUN_RANK), str(script), *arguments],
            env=os.environ | rank_environment(rank, nproc, port) | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(nproc)
    ]
    try:
        outputs = [rank.communicate(timeout=TIMEOUT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for number, (rank, output) in enumerate(zip(ranks, outputs, strict=True)):
        assert rank.returncode == 0, f"rank {number} of {nproc} failed:\n{output}"
