"""A node of a training job is cut off: what runs there runs on, and may change nothing."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from launch.slurm.excludes import excluded_now
from tests.slurm.conftest import SETTINGS, started_cluster
from tests.slurm.jobs import Job, run_here, submit

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Cut:
    """A job that has lost a node.

    Attributes:
        saved: the step of its newest checkpoint then.
        ranks: the processes of its ranks then, those that lived on included.
    """

    job: Job
    node: str
    saved: int
    ranks: tuple[int, ...]


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run of two ranks on this machine that nothing happened to."""
    return run_here(shards, tmp_path_factory.mktemp("whole"), nproc=2)


@pytest.fixture(scope="module")
def cuts(
    shards: Path, whole: list[float], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Cut, Cut]]:
    """A job of two nodes that has lost the second, and one that has lost its only one, which a
    cluster with two spare ones takes minutes to miss: at the same time.
    """
    with started_cluster(replace(SETTINGS, nodes=5, netns=True)) as cluster:

        def start(name: str, nodes: int, *settings: str) -> Job:
            profile = f"ranks_per_node: {2 // nodes}"
            folder = tmp_path_factory.mktemp(name)
            return submit(cluster, shards, folder, *settings, nodes=nodes, profile=profile)

        def cut(job: Job) -> Cut:
            job.wait_until(lambda: job.saved() >= 4)
            lost = Cut(job, job.nodes()[-1], job.saved(), (job.rank(0), job.rank(1)))
            cluster.cut(int(lost.node.removeprefix("node")))
            return lost

        of_two = cut(start("two", 2, "train.hang_timeout_s=5"))
        of_one = cut(start("one", 1))
        # They would be done before Slurm has missed their node.
        for pid in of_one.ranks:
            os.kill(pid, signal.SIGSTOP)
        yield of_two, of_one


def test_a_job_one_of_whose_nodes_is_cut_off_goes_on_with_a_spare_one(
    cuts: tuple[Cut, Cut], whole: list[float]
) -> None:
    cut, _ = cuts
    cut.job.wait_for_the_end()
    cut.job.assert_whole(whole)
    assert cut.job.first_step(cut.job.run.current_attempt()) > cut.saved
    assert cut.node not in cut.job.nodes()
    assert [entry.node for entry in excluded_now(cut.job.run)] == [cut.node]


def test_ranks_that_are_cut_off_change_nothing_once_another_attempt_has_begun(
    cuts: tuple[Cut, Cut], whole: list[float]
) -> None:
    _, cut = cuts
    run = cut.job.run
    cut.job.wait_until(lambda: run.current_attempt() == 2 and cut.job.saved() > cut.saved)
    for pid in cut.ranks:
        os.kill(pid, signal.SIGCONT)
    cut.job.wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in cut.ranks))
    cut.job.wait_for_the_end()
    cut.job.assert_whole(whole)
    assert cut.node not in cut.job.nodes()
    log = (run.folder_of(1) / "rank-0.log").read_text()
    assert "this one, attempt 1, has ended without changing anything more" in log
