"""A run, and the environment of a job's batch script."""

import signal
from pathlib import Path

import pytest

from pretrain.config import load_config
from pretrain.run_dir import RunDirectory
from tests.unit.launch.slurm.starts import addresses


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


@pytest.fixture
def on_n1_and_n2(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch script of job 7, after one requeue, on nodes n1 and n2; its run is prepared."""
    run.config.write_text(load_config("tiny").to_yaml())
    for name, value in {
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": "1",
        "SLURM_JOB_PARTITION": "gpu",
        "SLURM_JOB_NODELIST": "n1,n2",
        "SLURM_TASKS_PER_NODE": "1(x2)",
    }.items():
        monkeypatch.setenv(name, value)
    addresses(monkeypatch, {"n1": "10.9.9.9"})
    # What keeps a start alive that goes back to the queue.
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)


@pytest.fixture
def on_a_cluster(on_n1_and_n2: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with its name. What older versions have noted of a job is its number alone."""
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")
