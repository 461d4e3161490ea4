"""`farspan launch` on this machine: a run is watched, cancelled, resubmitted, killed, goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.local import rank_pids
from launch.run_state import read_state
from launch.tails import last_lines
from pretrain.run_dir import RunDirectory
from tests.ranks import ROOT, TIMEOUT_S

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc"),
]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "launch", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == code, output
    return output


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def has_reached(run: RunDirectory, step: int) -> bool:
    """Whether the step has been logged."""
    if not run.metrics.exists():
        return False
    return any(json.loads(line)["train/step"] >= step for line in last_lines(run.metrics, 1))


def log_of(run: RunDirectory, attempt: int) -> str:
    log = run.folder_of(attempt) / "rank-0.log"
    return log.read_text() if log.exists() else ""


def processes_of(run: RunDirectory) -> list[str]:
    """Of its launchers and ranks: their command lines."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if str(run.root) in command and re.search("launch (local|resubmit)|launch.rank", command):
            found.append(command)
    return found


def test_a_run_is_cancelled_and_resubmitted_and_its_logs_are_followed_over_a_restart(
    run: RunDirectory, shards: Path
) -> None:
    root = str(run.root)
    settings = (f"data.shards={shards}", "train.steps=100000", "data.seq_len=64")
    # None but that of the cancelled attempt, however long the second one lives.
    settings += ("checkpoint.every=100000", "wandb.mode=disabled")
    first = start("local", "tiny", "--run-dir", root, *settings)
    wait_until(lambda: has_reached(run, 2))
    assert read_state(run, None).state == "running"
    assert "first, or let it go on" in finish(start("resubmit", root), code=2)
    assert "saves and stops" in finish(start("cancel", root))
    assert "stopped on request" in finish(first, code=75)
    cancelled = read_state(run, None)
    assert (cancelled.state, cancelled.attempt) == ("cancelled", 1)
    assert cancelled.checkpoint == cancelled.step >= 2
    assert processes_of(run) == []

    again = start("resubmit", root)
    wait_until(lambda: has_reached(run, cancelled.step + 2))
    assert read_state(run, None).state == "running"
    followed, watched = start("logs", root, "--follow"), start("status", root, "--watch")
    os.kill(rank_pids(run)[0], signal.SIGKILL)
    wait_until(lambda: "step " in log_of(run, attempt=3))
    assert "no checkpoint yet" not in finish(start("cancel", root, "--now"))
    assert "rank 0 was killed by signal 9" in finish(again, code=1)
    assert processes_of(run) == []
    log = finish(followed)
    assert f"==> {run.folder_of(3) / 'rank-0.log'} <==" in log
    assert log.endswith(log_of(run, attempt=3))
    assert finish(watched).splitlines()[-1].split()[1:4] == ["cancelled", "attempt", "3"]
    (told,) = json.loads(finish(start("status", root, "--json")))
    assert (told["state"], told["attempt"], told["checkpoint"]) == ("cancelled", 3, cancelled.step)
    assert [failure["attempt"] for failure in told["failures"]] == [2]
    variables = {one["name"]: one["value"] for one in json.loads(run.environment_of(3).read_text())}
    assert (variables["MASTER_ADDR"], variables["FARSPAN_ATTEMPT"]) == ("127.0.0.1", "3")
    assert finish(start("logs", root, "--attempt", "1", "-n", "1")).startswith("step ")
