"""What one start of a job does after another, on nodes that are avoided or have failed."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from launch.causes import Cause
from launch.failures import note_failure, read_failure
from launch.slurm import begin
from launch.slurm.client import NodeInfo, Slurm
from launch.slurm.end import End, end, note_end
from launch.slurm.end import main as end_of_start
from launch.slurm.excludes import exclude
from launch.slurm.profile import Profile
from launch.slurm.requeue import avoid_excluded, let_back
from launch.slurm.start import Start, note_limit
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory
from tests.unit.launch.fake_slurm import FakeSlurm
from tests.unit.launch.slurm.starts import (
    AN_AGE_AGO,
    START,
    Nodes,
    begun,
    job,
    submitted,
    three_nodes,
)


@pytest.mark.usefixtures("on_n1_and_n2")
def test_a_start_on_a_node_that_is_avoided_goes_back_to_the_queue(
    run: RunDirectory, tmp_path: Path
) -> None:
    exclude(run, "n2", "it is broken", 3600)
    slurm = Nodes(three_nodes(), job(excluded=("mine",)))
    begin.begin(run, tmp_path, slurm)
    assert not (tmp_path / "command").exists()
    assert (slurm.requeued, slurm.avoided) == (["7"], [["mine", "n2"]])
    assert not run.all_attempts()


@pytest.mark.usefixtures("on_n1_and_n2")
@pytest.mark.parametrize(("there", "options"), [(2, ()), (3, ("--exclude=n3",))])
def test_a_node_is_used_again_where_there_are_too_few_others(
    run: RunDirectory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    there: int,
    options: Sequence[str],
) -> None:
    exclude(run, "n2", "it is broken", 3600)
    submitted(run, Profile(options=tuple(options)))
    slurm = Nodes(three_nodes()[:there], job())
    begin.begin(run, tmp_path, slurm)
    assert (tmp_path / "command").exists()
    assert not slurm.requeued
    assert "n2 is used again, there are too few others: it is broken" in capsys.readouterr().out


@pytest.mark.usefixtures("on_a_cluster")
@pytest.mark.parametrize(
    ("before", "first"),
    [
        (replace(START, restart=0), 1),
        (replace(START, restart=0, cluster="here"), 1),
        (replace(START, job="6", restart=9), 0),
    ],
)
def test_a_job_that_gets_such_nodes_again_and_again_uses_them(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: Start, first: int
) -> None:
    """Also if the newest attempt is another job's."""
    exclude(run, "n2", "it is broken", 3600)
    begun(run, before)
    # It has stopped and is in the queue; no node is to blame for that.
    run.stopped.write_text(json.dumps({"step": 3, "attempt": 1}))
    slurm = Nodes(three_nodes(), job())
    for restart in range(first, first + 4):
        assert not (tmp_path / "command").exists()
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        begin.begin(run, tmp_path, slurm)
    assert len(slurm.requeued) == begin.AVOIDED_TIMES
    assert (tmp_path / "command").exists()


@pytest.mark.usefixtures("on_n1_and_n2")
def test_another_start_tries_where_the_first_node_cannot_be_named(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(start: Start, slurm: Slurm) -> str:
        raise UserError("rank 0 would not be found")

    monkeypatch.setattr(begin, "_address", nowhere)
    slurm = Nodes(three_nodes(), job())
    codes = [begin.begin(run, tmp_path, slurm) for _ in range(3)]
    # Of the same error for the third time.
    assert codes == [0, 0, 1]
    assert slurm.requeued == ["7", "7"]
    failure = read_failure(run, 3)
    assert failure
    assert (failure.kind, failure.node) == ("error", "n1")
    assert not (tmp_path / "command").exists()


@pytest.mark.usefixtures("on_n1_and_n2")
def test_what_has_been_given_up_is_not_started(run: RunDirectory, tmp_path: Path) -> None:
    note_failure(run, begun(run, replace(START, restart=0)), "7", Cause("final", 0, "n1", "NaN"))
    # A job that depends on its success must not begin.
    assert begin.begin(run, tmp_path, Nodes(three_nodes(), job())) == 1
    assert not (tmp_path / "command").exists()
    assert run.all_attempts() == [1]
    run.done.write_text("{}")
    assert begin.begin(run, tmp_path, Nodes(three_nodes(), job())) == 0


@pytest.mark.usefixtures("on_n1_and_n2")
@pytest.mark.parametrize(
    ("variable", "before", "now"),
    [("FARSPAN_SUBMISSION", "farspan-1", "farspan-2"), ("SLURM_CLUSTER_NAME", "old", "new")],
)
def test_a_job_of_the_same_number_elsewhere_is_another_one(
    run: RunDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    before: str,
    now: str,
) -> None:
    """On another cluster, or on one that was set up anew, as that of a laptop is."""
    monkeypatch.setenv(variable, before)
    slurm = Nodes(three_nodes(), job(state="RUNNING"))
    assert begin.begin(run, tmp_path, slurm) == 0
    (run.folder_of(1) / "rank-0.exit").write_text("2\n")
    assert end(run, 252, slurm) == 2
    assert begin.begin(run, tmp_path, slurm) == 1
    monkeypatch.setenv(variable, now)
    assert begin.begin(run, tmp_path, slurm) == 0
    assert run.all_attempts() == [1, 2]
    # No node is to blame for what the other one was doing, and no file is taken away from it.
    monkeypatch.setenv(variable, before)
    dead = [NodeInfo(name="n1", state="DOWN"), *three_nodes()[1:]]
    begin.begin(run, tmp_path, Nodes(dead, job(state="RUNNING")))
    assert read_failure(run, 2) is None


@pytest.mark.usefixtures("on_a_cluster")
def test_an_attempt_that_an_older_version_began_has_stopped(run: RunDirectory) -> None:
    attempt, start = begun(run), Start.of_this_job(Nodes([]))
    run.stopped.write_text(json.dumps({"step": 3, "attempt": attempt}))
    assert note_end(run, start, 0, End.by_itself) is None
    # Not of another job.
    failure = note_end(run, replace(start, job="8"), 0, End.by_itself)
    assert failure
    assert failure.error.startswith("no attempt began")


@pytest.mark.usefixtures("on_a_cluster")
def test_failures_of_an_older_version_count(run: RunDirectory, tmp_path: Path) -> None:
    slurm = Nodes(three_nodes(), job(state="RUNNING"))
    for chain in ("7", "7", "7 of here"):
        assert begin.begin(run, tmp_path, slurm) == 0
        note_failure(run, run.all_attempts()[-1], chain, Cause("error", 0, "n1", "it is bad"))
    assert begin.begin(run, tmp_path, slurm) == 1


@pytest.mark.usefixtures("on_a_cluster")
def test_a_node_that_took_a_start_of_an_older_version_with_it_is_found_out(
    run: RunDirectory, tmp_path: Path
) -> None:
    before = begun(run, replace(START, restart=0))
    dead = [NodeInfo(name="n1", state="DOWN"), *three_nodes()[1:]]
    begin.begin(run, tmp_path, Nodes(dead, job(state="RUNNING")))
    failure = read_failure(run, before)
    assert failure
    assert (failure.kind, failure.node) == ("node", "n1")


@pytest.mark.usefixtures("on_a_cluster")
@pytest.mark.parametrize(
    ("before", "state", "is_taken"),
    [
        (START, "RUNNING", True),
        (replace(START, cluster="here"), "RUNNING", True),
        (replace(START, cluster="other"), "RUNNING", False),
        (replace(START, job="6"), "CANCELLED", True),
        (replace(START, job="6"), "RUNNING", False),
        (replace(START, job="6", cluster="here"), "CANCELLED", True),
        (replace(START, job="6", cluster="other"), "CANCELLED", False),
    ],
)
def test_the_run_is_taken_from_a_start_that_slurm_has_ended(
    run: RunDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    before: Start,
    state: str,
    is_taken: bool,
) -> None:
    """Its rank 0 lives on, where Slurm does not reach it."""
    monkeypatch.setenv("FARSPAN_ATTEMPT", str(begun(run, replace(before, restart=0))))
    with run.exclusive():
        begin.begin(run, tmp_path, Nodes(three_nodes(), job(state=state)))
        assert ("is out of reach" in capsys.readouterr().out) == is_taken
        if is_taken:
            with run.exclusive():
                pass


@pytest.mark.usefixtures("on_n1_and_n2")
@pytest.mark.parametrize("name", ["failure.json", "limit.txt"])
def test_what_cannot_be_written_is_told_without_a_traceback(
    run: RunDirectory,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    fake = FakeSlurm(tmp_path_factory.mktemp("slurm"))
    state, start = ("RUNNING", "Unknown") if name == "failure.json" else ("COMPLETING", AN_AGE_AGO)
    fake.add("7", state, start=start)
    monkeypatch.setenv("PATH", str(fake.path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    (run.folder_of(begun(run, replace(START, restart=0))) / name).mkdir()
    assert end_of_start([str(run.root), "1"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {run.folder_of(1) / name} cannot be written: ")
    assert told.endswith(f"`farspan launch resubmit {run.root}` goes on\n")


@pytest.mark.usefixtures("on_n1_and_n2")
def test_a_script_that_slurm_has_killed_at_the_limit_is_counted_by_the_next_start(
    run: RunDirectory, tmp_path: Path
) -> None:
    for restart in (0, 1):
        attempt = begun(run, replace(START, restart=restart))
        note_limit(run, replace(START, restart=restart), "it came to its limit")
        begin.catch_up(run, replace(START, restart=restart + 1), Nodes(three_nodes()), Profile())
        failure = read_failure(run, attempt)
        assert failure
        assert (failure.kind, failure.error) == ("killed", "it came to its limit")


@pytest.mark.usefixtures("on_n1_and_n2")
def test_modules_that_a_node_lacks_are_counted_as_failures(run: RunDirectory) -> None:
    slurm = Nodes([], job(state="RUNNING"))
    codes = []
    for _ in range(3):
        begun(run)
        codes.append(end(run, 1, slurm, "n2: module load cuda has failed"))
    assert codes == [0, 0, 1]
    failure = read_failure(run, 3)
    assert failure
    assert (failure.node, failure.error) == ("n2", "module load cuda has failed")


@pytest.mark.usefixtures("on_n1_and_n2")
def test_where_no_rank_has_begun_the_log_of_the_job_is_named(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when a container does not start: the folders of the attempts are empty then."""
    slurm = Nodes([], job(state="RUNNING"))
    for _ in range(3):
        begun(run, replace(START, folder=str(run.root)))
        code = end(run, 255, slurm)
    told = capsys.readouterr().err
    assert code == 1
    assert "exit code 255, before any rank had a log" in told
    assert "what starts them, such as a container, says why in the job's log" in told
    assert f"The job's log: {run.root}/slurm-7.log" in told


@pytest.mark.usefixtures("on_n1_and_n2")
def test_what_a_cancelled_start_could_not_prepare_is_no_failure(run: RunDirectory) -> None:
    begun(run)
    assert end(run, 1, Nodes([], job()), "n1: srun could not prepare the nodes") == 1
    assert read_failure(run, 1) is None


@pytest.mark.usefixtures("on_n1_and_n2")
def test_a_node_may_come_back_when_its_time_is_over(run: RunDirectory) -> None:
    exclude(run, "n3", "it was broken", -1)
    slurm = Nodes(three_nodes(), job(excluded=("mine", "n3")))
    avoid_excluded(run, slurm, START, Profile())
    assert slurm.avoided == [["mine"]]
    slurm = Nodes(three_nodes(), job(excluded=("mine",)))
    avoid_excluded(run, slurm, START, Profile())
    assert slurm.avoided == []


@pytest.mark.usefixtures("on_n1_and_n2")
def test_a_job_that_is_requeued_is_left_as_many_nodes_as_it_needs(run: RunDirectory) -> None:
    exclude(run, "n2", "it is broken", 3600)
    slurm = Nodes(three_nodes(), job(excluded=("n3",)))
    avoid_excluded(run, slurm, START, Profile(options=("--exclude=n3",)))
    assert slurm.avoided == []
    avoid_excluded(run, slurm, START, Profile())
    assert slurm.avoided == [["n3", "n2"]]


@pytest.mark.usefixtures("on_n1_and_n2")
def test_a_node_that_the_site_excludes_does_not_come_back(run: RunDirectory) -> None:
    exclude(run, "n3", "it was broken", -1)
    site = Profile(options=("--exclude=n3,n4",))
    waits = job(state="PENDING", excluded=("n3", "n4"))
    slurm = Nodes(three_nodes(), waits)
    avoid_excluded(run, slurm, START, site)
    assert let_back(run, slurm, site, [waits]) == {}
    assert slurm.avoided == []
    assert let_back(run, slurm, Profile(), [waits]) == {"7": ["n3"]}
    assert slurm.avoided == [["n4"]]
