"""Runs of a real cluster are watched, followed over requeues, cancelled and resubmitted."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from launch.slurm.job import read_job
from pretrain.run_dir import RunDirectory
from slurm.sandbox.cluster import Cluster
from tests.ranks import ROOT, TIMEOUT_S

pytestmark = pytest.mark.slow


class Farspan:
    """`farspan launch`, where it reaches the cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._environment = os.environ | cluster.environment()

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "launch", *arguments],
            cwd=ROOT,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, code: int = 0) -> str:
        return finish(self.start(*arguments), code)

    def submit(self, run: RunDirectory, shards: Path, *options: str) -> str:
        """A run of two ranks on two nodes that does not end by itself. Returns its job."""
        where = ("--nodes", "2", "--profile", "local-sandbox", "--run-dir", str(run.root))
        settings = (f"data.shards={shards}", "train.steps=100000", "data.seq_len=64")
        self.run("slurm", "tiny", *where, *options, *settings, "wandb.mode=disabled")
        return newest_job(run)

    def status(self, run: RunDirectory) -> dict:
        (state,) = json.loads(self.run("status", str(run.root), "--json"))
        return state


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == code, output
    return output


def newest_job(run: RunDirectory) -> str:
    job = read_job(run)
    assert job
    return job.submissions[-1].id


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def has_stepped(run: RunDirectory, attempt: int) -> bool:
    log = run.folder_of(attempt) / "rank-0.log"
    return log.exists() and len(re.findall(r"^step ", log.read_text(), re.MULTILINE)) >= 2


def ranks_of(run: RunDirectory) -> list[str]:
    """What runs under the name of a rank, wherever it was started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            command = entry.read_bytes().decode(errors="replace").split("\0")
            if "launch.rank" in command and str(run.root) in command:
                found.append(entry.parent.name)
    return found


def test_a_run_is_cancelled_resubmitted_and_followed_over_a_requeue(
    cluster: Cluster, shards: Path, tmp_path: Path
) -> None:
    farspan, run = Farspan(cluster), RunDirectory(tmp_path / "a run of mine")
    waiting = RunDirectory(tmp_path / "waiting")
    first = farspan.submit(run, shards)
    second = farspan.submit(waiting, shards, "--dependency", f"afterany:{first}")
    queued = farspan.status(waiting)
    assert (queued["state"], queued["where"]) == ("queued", f"job {second}")
    assert queued["detail"].startswith("Dependency")
    assert f"job {second} is ended, it is pending" in farspan.run("cancel", str(waiting.root))
    assert farspan.status(waiting)["state"] == "cancelled"

    wait_until(lambda: has_stepped(run, 1))
    running = farspan.status(run)
    assert (running["state"], running["attempt"]) == ("running", 1)
    assert re.fullmatch(rf"job {first} on node\d, node\d", running["where"])
    assert f"job {first}" in farspan.run("resubmit", str(run.root), code=2)
    assert "saves and stops" in farspan.run("cancel", str(run.root))
    cancelled = farspan.status(run)
    assert (cancelled["state"], cancelled["attempt"]) == ("cancelled", 1)
    assert cancelled["checkpoint"] == cancelled["step"] >= 2
    assert (ranks_of(run), cluster.call("squeue", "--noheader")) == ([], "")
    log = farspan.run("logs", str(run.root), "--job")
    assert re.search("^cancelled by .*; `farspan launch resubmit", log, re.MULTILINE)

    assert "resubmitted job" in farspan.run("resubmit", str(run.root))
    third = newest_job(run)
    assert third not in (first, second)
    wait_until(lambda: has_stepped(run, 2))
    assert farspan.status(run)["step"] > cancelled["step"]
    followed = farspan.start("logs", str(run.root), "--follow")
    cluster.call("scontrol", "requeue", third)
    wait_until((run.folder_of(3) / "rank-0.log").exists)
    assert f"job {third} is ended, it is running" in farspan.run("cancel", str(run.root), "--now")
    ended = farspan.status(run)
    assert (ended["state"], ended["attempt"]) == ("cancelled", 3)
    assert (ranks_of(run), cluster.call("squeue", "--noheader")) == ([], "")
    log = finish(followed)
    assert f"==> {run.folder_of(3) / 'rank-0.log'} <==" in log
    assert log.endswith((run.folder_of(3) / "rank-0.log").read_text())
