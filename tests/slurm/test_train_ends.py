"""What ends a training job for a while or for good: hanging, a mistake, a crash loop, a person."""

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launch.slurm.excludes import excluded_now
from slurm.sandbox.cluster import Cluster
from tests.ranks import TIMEOUT_S
from tests.slurm.conftest import SETTINGS, started_cluster
from tests.slurm.jobs import (
    FARSPAN,
    IMPORTS_UNTIL_TOLD,
    run_here,
    submit,
    submit_by_hand,
)

pytestmark = pytest.mark.slow

# The others wait for rank 1. (SIGSTOP would not do: before its own signals Slurm sends SIGCONT.)
COMES_TO_NOTHING_AT_FIRST = """
if [[ $* == *launch.rank* && $SLURM_PROCID == 1 && -z ${SLURM_RESTART_COUNT:-} ]]; then
  exec sleep 1000
fi
exec "$REAL" "$@"
"""


def test_jobs_that_hang_are_ended_by_the_watchdog_or_at_their_time_limit_and_go_on(
    cluster: Cluster, shards: Path, tmp_path: Path
) -> None:
    for name in ("watched", "limited"):
        (tmp_path / name).mkdir()
    whole = run_here(shards, tmp_path, nproc=2)
    # By hand, as farspan wants more time; and a signal that nobody heeds instead of a request.
    limits = ["--time=2", "--signal=URG@1"]
    limited = submit_by_hand(
        cluster, shards, tmp_path / "limited", *limits, python=COMES_TO_NOTHING_AT_FIRST
    )
    watched = submit(cluster, shards, tmp_path / "watched", "train.hang_timeout_s=5")
    watched.wait_until(lambda: watched.saved() >= 4)
    stopped = watched.rank(1)
    os.kill(stopped, signal.SIGSTOP)
    node = watched.nodes()[1]
    limited.wait_until(lambda: limited.requeues() >= 1)
    # A busy machine may need more than two minutes for what is left.
    limited.slurm("scontrol", "update", f"JobId={limited.number}", "TimeLimit=60")
    for job in (limited, watched):
        job.wait_for_the_end()
        job.assert_whole(whole)
    assert limited.requeues() >= 1
    assert watched.requeues() == 1
    assert "DUE TO TIME LIMIT" in limited.log()
    assert "does not answer" in watched.failure(1)["error"]
    assert [entry.node for entry in excluded_now(watched.run)] == [node]
    assert node not in watched.nodes()
    assert not watched.ranks()


def test_a_job_that_a_preemption_ends_requeues_itself(shards: Path, tmp_path: Path) -> None:
    # Slurm's default of 30 s may be too little where other tests share the cores.
    settings = replace(SETTINGS, nodes=2, conf=["PreemptMode=CANCEL", "KillWait=300"])
    with started_cluster(settings) as cluster:
        job = submit(cluster, shards, tmp_path)
        job.wait_until(lambda: job.saved() >= 4)
        urgent = ["--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null"]
        job.slurm("sbatch", *urgent, "--wrap=sleep 1")
        job.wait_until(lambda: job.requeues() == 1)
        job.wait_for_the_end()
    assert "requeued: a job of more importance has taken its nodes" in job.log()
    assert not job.run.failure_of(1).exists()


def test_a_mistake_is_not_made_again(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    job = submit_by_hand(cluster, shards, tmp_path, python=IMPORTS_UNTIL_TOLD)
    job.wait_until(lambda: len(job.ranks()) >= 2)
    # Rank 0 alone finds out; that the other one has lost it is no reason to start again.
    with job.run.exclusive():
        (tmp_path / "go").touch()
        job.wait_until(job.has_ended)
    assert (job.exit_code(), job.requeues()) == (2, 0)
    assert "is in use by process" in job.log()


def test_a_job_that_crashes_three_times_alike_is_given_up_with_a_diagnosis(
    cluster: Cluster, shards: Path, tmp_path: Path
) -> None:
    crashes = 'if [[ $* == *launch.rank* ]]; then echo "error: no room on /scratch"; exit 1; fi'
    job = submit_by_hand(cluster, shards, tmp_path, python=f'{crashes}\nexec "$REAL" "$@"')
    job.wait_until(job.has_ended)
    assert (job.exit_code(), job.requeues()) == (1, 2)
    assert job.run.all_attempts() == [1, 2, 3]
    assert "gave up: attempts 1, 2 and 3 died of the same error" in job.log()
    assert "no room on /scratch" in job.log()


def test_a_job_that_a_person_ends_stays_ended(
    cluster: Cluster, shards: Path, tmp_path: Path
) -> None:
    job = submit(cluster, shards, tmp_path)
    job.wait_until(lambda: job.saved() >= 4)
    job.slurm("scancel", job.number)
    job.wait_until(job.has_ended)
    assert (job.field("JobState"), job.requeues()) == ("CANCELLED", 0)
    assert not job.ranks()
    assert not job.run.done.exists()
    assert not job.run.failure_of(1).exists()
    assert "not started again, it was cancelled" in job.log()


def test_a_run_that_is_there_already_is_not_submitted_twice(
    cluster: Cluster, shards: Path, tmp_path: Path
) -> None:
    job = submit(cluster, shards, tmp_path, "train.steps=1000")
    again = cluster.command(*FARSPAN, "launch", "slurm", "tiny-hybrid-moe", "--nodes", "2")
    options = ["--profile", "local-sandbox", "--run-dir", str(job.run.root)]
    done = subprocess.run(
        [*again, *options],
        env=cluster.environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 2
    assert f"(job {job.number}" in done.stderr
