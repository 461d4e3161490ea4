"""The batch script on a real Slurm of two nodes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from pretrain.run_dir import RunDirectory
from slurm.sandbox.cluster import Cluster
from tests.ranks import ROOT, TIMEOUT_S

pytestmark = pytest.mark.slow


class Job:
    """A run of 30 steps on two nodes, one rank each."""

    def __init__(
        self, cluster: Cluster, shards: Path, folder: Path, python: str | None = None
    ) -> None:
        """
        Args:
            python: a bash script that the job finds under that name; `$REAL` is the true one.
        """
        self.run = RunDirectory(folder / "run")
        self.settings = [f"data.shards={shards}", "train.steps=30", "parallel.ep=2"]
        self._environment = cluster.environment()
        if python:
            shim = folder / "bin" / "python"
            shim.parent.mkdir()
            shim.write_text(f"#!/bin/bash\nREAL={sys.executable}\n{python}\n")
            shim.chmod(0o755)
            self._environment["PATH"] = f"{shim.parent}:{self._environment['PATH']}"
        submit = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--chdir={folder}"]
        script = [str(ROOT / "slurm" / "train.sbatch"), "tiny-hybrid-moe", str(self.run.root)]
        self.number = self._call(*submit, *script, *self.settings).strip()
        self._log = folder / f"farspan-{self.number}.log"

    def _call(self, *command: str) -> str:
        return subprocess.check_output(command, env=self._environment, text=True, timeout=TIMEOUT_S)

    def ask_to_stop(self) -> None:
        """What the time limit sends."""
        self._call("scancel", "--signal=USR2", self.number)

    def requeues(self) -> int:
        return int(self._field("Restarts"))

    def has_ended(self) -> bool:
        return self._field("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")

    def exit_code(self) -> int:
        return int(self._field("ExitCode").partition(":")[0])

    def _field(self, name: str) -> str:
        shown = self._call("scontrol", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S+)", shown))[name]

    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def losses(self) -> list[float]:
        return losses(self.run.root)

    def ranks(self) -> list[int]:
        """The process ids of what runs under the name of a rank."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                command = (entry / "cmdline").read_bytes().decode().split("\0")
                if "launch.rank" in command and str(self.run.root) in command:
                    found.append(int(entry.name))
        return found

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run on this machine that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    command = [sys.executable, "-m", "launch.cli", "train", "tiny-hybrid-moe", "--nproc", "2"]
    settings = ["--run-dir", str(run), f"data.shards={shards}", "train.steps=30", "parallel.ep=2"]
    subprocess.run([*command, *settings], cwd=ROOT, check=True, timeout=TIMEOUT_S)
    return losses(run)


def test_a_job_stopped_in_time_requeues_itself_and_ends_with_the_losses_of_a_local_run(
    cluster: Cluster, shards: Path, tmp_path: Path, whole: list[float]
) -> None:
    job = Job(cluster, shards, tmp_path)
    job.wait_until(lambda: len(job.losses()) >= 5)
    job.ask_to_stop()
    job.wait_until(job.run.done.exists)
    assert job.losses() == whole
    assert job.requeues() == 1
    assert "requeued: it was asked to stop" in job.log()


# A rank takes long to import, and ignores what it gets meanwhile, as its wrapper has told it to.
IMPORTS_UNTIL_TOLD = """
while [[ $* == *launch.rank* && ! -e go ]]; do sleep 0.05; done
exec "$REAL" "$@"
"""


def test_a_request_that_comes_while_the_ranks_still_import_is_kept(
    cluster: Cluster, shards: Path, tmp_path: Path, whole: list[float]
) -> None:
    job = Job(cluster, shards, tmp_path, IMPORTS_UNTIL_TOLD)
    job.wait_until(lambda: len(job.ranks()) >= 2)
    job.ask_to_stop()
    (tmp_path / "go").touch()
    job.wait_until(lambda: job.requeues() == 1 or job.run.done.exists())
    assert job.requeues() == 1
    assert "requeued: it was asked to stop" in job.log()
    assert len(job.losses()) < 30
    job.wait_until(job.run.done.exists)
    assert job.losses() == whole
    assert job.run.current_attempt() == 2


def test_a_job_whose_rank_is_killed_names_it_requeues_itself_and_goes_on(
    cluster: Cluster, shards: Path, tmp_path: Path, whole: list[float]
) -> None:
    job = Job(cluster, shards, tmp_path)
    job.wait_until(lambda: len(job.losses()) >= 5)
    python = [pid for pid in job.ranks() if "python" in os.readlink(f"/proc/{pid}/exe")]
    os.kill(python[0], signal.SIGKILL)
    job.wait_until(job.run.done.exists)
    assert job.losses() == whole
    assert job.requeues() == 1
    assert re.search(rf"error: rank \d \(process {python[0]} on \S+\) is dead", job.log())
    assert "requeued: it has failed" in job.log()


def test_a_job_whose_node_fails_starts_again_and_goes_on(
    cluster: Cluster, shards: Path, tmp_path: Path, whole: list[float]
) -> None:
    job = Job(cluster, shards, tmp_path)
    job.wait_until(lambda: len(job.losses()) >= 5)
    # The second one: the script runs on the first.
    cluster.kill_node(2)
    cluster.start_node(2)
    job.wait_until(job.run.done.exists)
    assert job.losses() == whole
    assert job.requeues() >= 1


def test_a_mistake_is_not_made_again(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    job = Job(cluster, shards, tmp_path, IMPORTS_UNTIL_TOLD)
    job.wait_until(lambda: len(job.ranks()) >= 2)
    # Rank 0 alone finds out; that the other one has lost it is no reason to start again.
    with job.run.exclusive():
        (tmp_path / "go").touch()
        job.wait_until(job.has_ended)
    assert (job.exit_code(), job.requeues()) == (2, 0)
    assert "is in use by process" in job.log()


def test_a_job_that_gets_nowhere_is_given_up(
    cluster: Cluster, shards: Path, tmp_path: Path
) -> None:
    dies = 'if [[ $* == *launch.rank* ]]; then exit 70; fi; exec "$REAL" "$@"'
    job = Job(cluster, shards, tmp_path, dies)
    job.wait_until(job.has_ended)
    assert (job.exit_code(), job.requeues()) == (1, 3)
    assert "gave up: 3 requeues did not get beyond step 0" in job.log()


def losses(run: Path) -> list[float]:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line)["train/loss"] for line in lines if line.endswith("\n")]
