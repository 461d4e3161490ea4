"""The life of a training job on a real Slurm: what ends it early leaves the run whole."""

import os
import signal
from pathlib import Path

import pytest

from launch.slurm.excludes import excluded_now
from slurm.sandbox.cluster import Cluster
from tests.slurm.jobs import IMPORTS_UNTIL_TOLD, read_json, run_here, submit, submit_by_hand

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run of two ranks on this machine that nothing happened to."""
    return run_here(shards, tmp_path_factory.mktemp("whole"), nproc=2)


def test_two_nodes_of_two_ranks_end_with_the_losses_of_four_ranks_here(
    cluster: Cluster, shards: Path, tmp_path: Path
) -> None:
    name = "a 'run\" $(touch pwned) `touch pwned` ; \n   JobState=FAILED ü€"
    job = submit(cluster, shards, tmp_path, profile="ranks_per_node: 2", name=name)
    job.wait_for_the_end()
    (tmp_path / "here").mkdir()
    job.assert_whole(run_here(shards, tmp_path / "here", nproc=4))
    attempt = job.run.folder_of(1)
    assert sorted(path.name for path in attempt.glob("rank-*")) == [
        f"rank-{rank}.log" for rank in range(4)
    ]
    variables = read_json(job.run.environment_of(1))
    assert {"MASTER_PORT", "OMP_NUM_THREADS"} <= {variable["name"] for variable in variables}
    assert "OMP_NUM_THREADS=1" in job.log()
    allocation = read_json(job.run.allocation_of(1))
    assert (allocation["nodes"], allocation["tasks"]) == (job.nodes(), [2, 2])
    assert not list(tmp_path.rglob("pwned"))


def test_a_request_to_stop_that_comes_while_ranks_import_is_kept_and_a_requeue_loses_little(
    cluster: Cluster, shards: Path, tmp_path: Path, whole: list[float]
) -> None:
    job = submit_by_hand(cluster, shards, tmp_path, python=IMPORTS_UNTIL_TOLD)
    job.wait_until(lambda: len(job.ranks()) >= 2)
    job.ask_to_stop()
    (tmp_path / "go").touch()
    job.wait_until(lambda: job.requeues() == 1 or job.run.done.exists())
    assert job.requeues() == 1
    job.wait_until(lambda: "requeued: it was asked to stop" in job.log())
    stopped_at, wandb_id = job.saved(), job.run.wandb_id.read_text()
    assert stopped_at < 16
    job.wait_until(lambda: job.saved() >= stopped_at + 4)
    saved = job.saved()
    # By a person, without a warning.
    job.slurm("scontrol", "requeue", job.number)
    job.wait_for_the_end()
    job.assert_whole(whole)
    assert job.first_step(2) == stopped_at + 1
    assert job.first_step(3) > saved
    assert job.run.wandb_id.read_text() == wandb_id
    # Neither says anything of the run, nor of its nodes.
    assert not list(job.run.attempts.glob("*/failure.json"))
    assert not excluded_now(job.run)


def test_a_preempted_job_saves_and_goes_on_when_there_are_nodes_again(
    cluster: Cluster, shards: Path, tmp_path: Path, whole: list[float]
) -> None:
    job = submit(cluster, shards, tmp_path, profile="ranks_per_node: 1\npartition: preempt")
    job.wait_until(lambda: job.saved() >= 4)
    urgent = ["--partition=urgent", "--exclusive", "--nodes=4", "--output=/dev/null"]
    job.slurm("sbatch", *urgent, "--wrap=sleep 1")
    job.wait_until(lambda: job.requeues() == 1)
    job.wait_for_the_end()
    job.assert_whole(whole)
    assert job.first_step(2) > 4
    assert not job.run.failure_of(1).exists()


def test_a_job_whose_rank_is_killed_names_it_requeues_itself_and_goes_on(
    cluster: Cluster, shards: Path, tmp_path: Path, whole: list[float]
) -> None:
    job = submit(cluster, shards, tmp_path)
    job.wait_until(lambda: job.saved() >= 4)
    saved = job.saved()
    os.kill(job.rank(1), signal.SIGKILL)
    job.wait_for_the_end()
    job.assert_whole(whole)
    assert job.requeues() == 1
    assert job.first_step(2) > saved
    failure = job.failure(1)
    assert (failure["kind"], failure["rank"]) == ("killed", 1)
    # Slurm's name of the node, which its host does not have here.
    assert failure["node"] == read_json(job.run.allocation_of(1))["nodes"][1]
    assert "attempt 1 has failed: rank 1 on node" in job.log()


def test_a_job_whose_first_node_dies_goes_on_without_it_even_when_it_is_back(
    cluster: Cluster, shards: Path, tmp_path: Path, whole: list[float]
) -> None:
    job = submit(cluster, shards, tmp_path)
    job.wait_until(lambda: job.saved() >= 4)
    saved, dead = job.saved(), job.nodes()[0]
    # The batch script dies with it. It is back before Slurm has missed it, as after a reboot.
    cluster.kill_node(int(dead.removeprefix("node")))
    cluster.start_node(int(dead.removeprefix("node")))
    job.wait_for_the_end()
    job.assert_whole(whole)
    last = job.run.current_attempt()
    assert job.first_step(last) > saved
    assert dead not in read_json(job.run.allocation_of(last))["nodes"]
    assert [entry.node for entry in excluded_now(job.run)] == [dead]
    assert job.failure(1)["kind"] == "node"


def test_a_job_whose_second_node_dies_goes_on_with_a_spare_one(
    cluster: Cluster, shards: Path, tmp_path: Path, whole: list[float]
) -> None:
    job = submit(cluster, shards, tmp_path)
    job.wait_until(lambda: job.saved() >= 4)
    saved, dead = job.saved(), job.nodes()[1]
    cluster.kill_node(int(dead.removeprefix("node")))
    job.wait_for_the_end()
    job.assert_whole(whole)
    assert job.first_step(2) > saved
    assert dead not in job.nodes()
    assert [entry.node for entry in excluded_now(job.run)] == [dead]
    assert job.failure(1)["node"] == dead
