"""Runs that the tests submit to a cluster, and what becomes of them."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.run_dir import RunDirectory
from slurm.sandbox.cluster import Cluster
from tests.ranks import ROOT, TIMEOUT_S

# For `submit_by_hand`: a rank imports until there is a file `go` beside the run directory, and
# ignores what it gets meanwhile, as its wrapper has told it to.
IMPORTS_UNTIL_TOLD = """
while [[ $* == *launch.rank* && ! -e ../go ]]; do sleep 0.05; done
exec "$REAL" "$@"
"""
FARSPAN = (sys.executable, "-m", "launch.cli")
# A job trains twenty steps while Slurm answers on a busy machine.
ASK_SLURM_S = 5.0
OVER = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")


class Job:
    """A job that trains a run."""

    def __init__(self, cluster: Cluster, run: RunDirectory, number: str) -> None:
        self._cluster = cluster
        self.run = run
        self.number = number

    def slurm(self, *command: str) -> str:
        return self._cluster.call(*command)

    def ask_to_stop(self) -> None:
        """What the time limit sends."""
        self.slurm("scancel", "--signal=USR2", self.number)

    def requeues(self) -> int:
        return int(self.field("Restarts"))

    def has_ended(self) -> bool:
        return self.field("JobState") in OVER

    def exit_code(self) -> int:
        return int(self.field("ExitCode").partition(":")[0])

    def nodes(self) -> list[str]:
        """Where it runs, or has run last."""
        shown = re.search(r" NodeList=(\S+)", self.slurm("scontrol", "show", "job", self.number))
        assert shown
        return self.slurm("scontrol", "show", "hostnames", shown[1]).split()

    def field(self, name: str) -> str:
        shown = self.slurm("scontrol", "show", "job", self.number)
        # Paths come last, and may look like fields.
        found = re.search(rf"\b{name}=(\S+)", shown)
        assert found, shown
        return found[1]

    def log(self) -> str:
        log = self.run.root / f"slurm-{self.number}.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def losses(self) -> list[float]:
        return losses(self.run)

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        return int(read_json(self.run.saved)["step"]) if self.run.saved.exists() else 0

    def first_step(self, attempt: int) -> int:
        """The step with which an attempt went on."""
        log = (self.run.folder_of(attempt) / "rank-0.log").read_text()
        found = re.search(r"^step (\d+)/", log, re.MULTILINE)
        assert found, log
        return int(found[1])

    def failure(self, attempt: int) -> dict[str, Any]:
        """What an attempt died of."""
        return read_json(self.run.failure_of(attempt))

    def ranks(self) -> list[int]:
        """The process ids of its ranks, and of what stands for their interpreter."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                command = (entry / "cmdline").read_bytes().decode().split("\0")
                if "launch.rank" in command and str(self.run.root) in command:
                    found.append(int(entry.name))
        return found

    def rank(self, number: int) -> int:
        """The process id of a rank."""
        for pid in self.ranks():
            with suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                is_python = "python" in os.readlink(f"/proc/{pid}/exe")
                if is_python and f"RANK={number}".encode() in variables:
                    return pid
        raise AssertionError(f"rank {number} does not run\n{self.log()}")

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Raises AssertionError where the job ends before, or after far too long."""
        began = asked = time.monotonic()
        while not condition():
            time.sleep(0.05)
            if time.monotonic() - asked > ASK_SLURM_S:
                is_in_vain = time.monotonic() - began > TIMEOUT_S or self.has_ended()
                assert not is_in_vain or condition(), self.log()
                asked = time.monotonic()

    def wait_for_the_end(self) -> None:
        """Until the run is done, and Slurm knows it."""
        self.wait_until(self.has_ended)
        assert self.run.done.exists(), self.log()
        state, code = self.field("JobState"), self.exit_code()
        assert (state, code) == ("COMPLETED", 0), f"{state}, {code}\n{self.log()}"

    def assert_whole(self, whole: list[float]) -> None:
        """The run has the losses of one that nothing happened to, each token exactly once."""
        assert self.losses() == whole
        audit = [*FARSPAN, "audit", str(self.run.root)]
        done = subprocess.run(audit, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, done.stdout + done.stderr


def submit(
    cluster: Cluster,
    shards: Path,
    folder: Path,
    *settings: str,
    nodes: int = 2,
    profile: str = "",
    name: str = "run",
) -> Job:
    """Submit a run of 40 steps by `farspan launch slurm`: two nodes, one rank each.

    Args:
        settings: besides those that all runs have.
        profile: lines of YAML, over those of local-sandbox.
        name: of the run directory.
    """
    run = RunDirectory(folder / name)
    site = folder / "site.yaml"
    site.write_text(f"extends: local-sandbox\n{profile or 'ranks_per_node: 1'}\n")
    options = ["--nodes", str(nodes), "--profile", str(site), "--run-dir", str(run.root)]
    command = [*FARSPAN, "launch", "slurm", "tiny-hybrid-moe", *options]
    printed = cluster.call(*command, *run_settings(shards), *settings, timeout_s=TIMEOUT_S)
    found = re.search(r"^submitted job (\d+), ", printed, re.MULTILINE)
    assert found, printed
    return Job(cluster, run, found[1])


def submit_by_hand(
    cluster: Cluster, shards: Path, folder: Path, *options: str, python: str = 'exec "$REAL" "$@"'
) -> Job:
    """Submit the same with sbatch, as a reader of the batch script would.

    Args:
        options: of sbatch.
        python: a bash script that the job takes for the interpreter; `$REAL` is the true one.
    """
    run = RunDirectory(folder / "run")
    prepare = ["train", "tiny-hybrid-moe", "--prepare-only", "--nproc", "2"]
    prepare += ["--run-dir", str(run.root), *run_settings(shards)]
    subprocess.run([*FARSPAN, *prepare], cwd=ROOT, check=True, timeout=TIMEOUT_S)
    program = folder / "python"
    program.write_text(f"#!/bin/bash\nREAL={sys.executable}\n{python}\n")
    program.chmod(0o755)
    each = ["--nodes=2", "--ntasks-per-node=1", f"--chdir={run.root}", *options]
    command = ["sbatch", "--parsable", *each, str(ROOT / "slurm" / "train.sbatch"), str(run.root)]
    number = cluster.call("env", f"FARSPAN_PYTHON={program}", *command).strip()
    return Job(cluster, run, number)


def run_settings(shards: Path) -> list[str]:
    return [f"data.shards={shards}", "train.steps=40", "checkpoint.every=4", "parallel.ep=2"]


def run_here(shards: Path, folder: Path, nproc: int) -> list[float]:
    """The losses of the run on this machine."""
    run = RunDirectory(folder / "run")
    options = ["--nproc", str(nproc), "--run-dir", str(run.root), *run_settings(shards)]
    command = [*FARSPAN, "train", "tiny-hybrid-moe", *options]
    subprocess.run(command, cwd=ROOT, check=True, timeout=TIMEOUT_S)
    return losses(run)


def losses(run: RunDirectory) -> list[float]:
    lines = run.metrics.read_text().splitlines(keepends=True) if run.metrics.exists() else []
    return [json.loads(line)["train/loss"] for line in lines if line.endswith("\n")]


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content
