"""Run a script on N gloo ranks inside a test."""

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Against hanging for ever, where no collective ends it: a busy machine may take ten times as long
# as a quiet one, and one launch may hold dozens of cases.
TIMEOUT_S = 3600


def run_on_ranks(nproc: int, script: Path, *arguments: str) -> None:
    """Run `script` on ranks of this machine; fail with the output of a rank that fails."""
    process = _ready_process()
    assert process.stdin is not None
    assert process.stdout is not None
    launch = {
        "nproc": nproc,
        "script": str(script),
        "arguments": arguments,
        "environment": dict(os.environ),
        "timeout_s": TIMEOUT_S,
    }
    process.stdin.write(json.dumps(launch) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    assert answer, f"{script}: what forks ranks has ended"
    problem = json.loads(answer)
    assert problem is None, problem


@cache
def _ready_process() -> subprocess.Popen[str]:
    """What forks the ranks of this process's tests: to import torch takes each of them 3 s."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forked_ranks"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    atexit.register(process.wait)
    atexit.register(process.stdin.close)
    return process
