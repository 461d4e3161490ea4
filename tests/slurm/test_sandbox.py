"""The sandbox is a cluster that loses nodes, and leaves nothing behind."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from slurm.sandbox import accounting, programs
from slurm.sandbox.cluster import Cluster
from slurm.sandbox.settings import Settings
from tests.ranks import TIMEOUT_S
from tests.slurm.conftest import lacks, started_cluster

pytestmark = pytest.mark.slow

# The task starts a process that is no child of Slurm's, and writes as long as it lives.
JOB = """#!/bin/bash
#SBATCH --nodes=1 --requeue --output=/dev/null
srun --mpi=none bash -c '
  setsid --fork sleep 86399.25
  while true; do date +%s.%N > "$0/$SLURMD_NODENAME-$SLURM_RESTART_COUNT"; sleep 0.1; done
' "$1"
"""


def submit(cluster: Cluster, folder: Path) -> str:
    script = folder / "job.sh"
    script.write_text(JOB)
    return cluster.call("sbatch", "--parsable", str(script), str(folder)).strip()


def wait_until(condition: Callable[[], bool], cluster: Cluster) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, cluster.status()
        time.sleep(0.1)


def writes(file: Path) -> bool:
    """Whether a task still writes its file, ten times a second."""
    before = file.read_text()
    time.sleep(2)
    return file.read_text() != before


def left_behind() -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "cmdline").read_bytes().startswith(b"sleep\086399.25"):
                found.append(process.name)
    return found


def test_a_killed_node_takes_its_tasks_with_it_and_stop_leaves_no_process(tmp_path: Path) -> None:
    with started_cluster(Settings(nodes=1, cpus=1, gpus=0)) as cluster:
        submit(cluster, tmp_path)
        wait_until((tmp_path / "node1-").exists, cluster)
        wait_until(lambda: len(left_behind()) == 1, cluster)
        cluster.kill_node(1)
        assert not left_behind()
        wait_until(lambda: cluster.nodes()["node1"].startswith("down"), cluster)
        cluster.start_node(1)
        wait_until((tmp_path / "node1-1").exists, cluster)
        wait_until(lambda: len(left_behind()) == 1, cluster)
    assert not left_behind()


def test_a_node_that_is_cut_off_runs_on_until_it_is_joined_again(tmp_path: Path) -> None:
    with started_cluster(Settings(nodes=2, cpus=1, gpus=0, netns=True)) as cluster:
        assert cluster.call("hostname", node=2) == "node2\n"
        submit(cluster, tmp_path)
        cut_off = tmp_path / "node1-"
        wait_until(cut_off.exists, cluster)
        cluster.cut(1)
        wait_until((tmp_path / "node2-1").exists, cluster)
        wait_until(lambda: writes(cut_off), cluster)
        cluster.join(1)
        # Slurm ends there what it has given to another node.
        wait_until(lambda: cluster.nodes()["node1"] == "idle", cluster)
        wait_until(lambda: not writes(cut_off), cluster)
    assert not left_behind()


def test_accounting_remembers_a_job() -> None:
    if missing := programs.missing(accounting.PROGRAMS):
        lacks(f"no {', '.join(missing)} ({accounting.INSTALL})")
    with started_cluster(Settings(nodes=1, cpus=1, gpus=0, accounting=True)) as cluster:
        cluster.call("sbatch", "--output=/dev/null", "--wrap=true")
        wait_until(lambda: "COMPLETED" in cluster.call("sacct", "-nX", "-o", "State"), cluster)
