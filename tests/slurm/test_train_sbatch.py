"""The batch script on a real Slurm of two nodes."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import ROOT, TIMEOUT_S

SANDBOX = ROOT.parent / "shared" / "tools" / "slurm_sandbox"
NEEDS = ("sbatch", "slurmctld", "slurmd", "munged")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SANDBOX.exists(), reason=f"no {SANDBOX} to start a cluster with"),
    pytest.mark.skipif(
        not all(map(shutil.which, NEEDS)), reason=f"Slurm is not installed ({', '.join(NEEDS)})"
    ),
]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which sbatch reaches a cluster of two nodes."""
    folder = tmp_path / "cluster"
    script = tmp_path / "slurm_sandbox"
    shutil.copy(SANDBOX, script)
    start = ["bash", str(script), "start", str(folder), "--nodes", "2", "--cpus", "1"]
    subprocess.run(start, check=True, timeout=TIMEOUT_S)
    try:
        yield os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
    finally:
        subprocess.run(["bash", str(script), "stop", str(folder)], check=True, timeout=TIMEOUT_S)


def test_a_job_stopped_in_time_requeues_itself_and_ends_with_the_losses_of_a_local_run(
    cluster: dict[str, str], shards: Path, tmp_path: Path
) -> None:
    settings = [f"data.shards={shards}", "train.steps=30", "parallel.ep=2"]
    local = tmp_path / "local"
    command = [sys.executable, "-m", "launch.cli", "train", "tiny-hybrid-moe", *settings]
    subprocess.run(
        [*command, "--nproc", "2", "--run-dir", str(local)], cwd=ROOT, check=True, timeout=TIMEOUT_S
    )

    run = tmp_path / "run"
    submit = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--chdir={tmp_path}"]
    script = [str(ROOT / "slurm" / "train.sbatch"), "tiny-hybrid-moe", str(run), *settings]
    job = subprocess.check_output([*submit, *script], env=cluster, text=True).strip()
    log = tmp_path / f"farspan-{job}.log"
    wait_until(lambda: len(losses(run)) >= 5, log)
    # What the time limit sends: the ranks save and stop, and the script requeues the job.
    subprocess.run(["scancel", "--signal=USR2", job], env=cluster, check=True, timeout=TIMEOUT_S)
    wait_until((run / "done.json").exists, log)
    assert losses(run) == losses(local)
    show = ["scontrol", "show", "job", job]
    assert "Restarts=1" in subprocess.check_output(show, env=cluster, text=True)


def losses(run: Path) -> list[float]:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line)["train/loss"] for line in lines if line.endswith("\n")]


def wait_until(condition, log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.1)
