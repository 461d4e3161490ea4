"""How a start of a job finds out where it is and how it has ended."""

import json
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from launch.causes import Cause
from launch.failures import note_failure, read_failure
from launch.slurm import begin
from launch.slurm.client import JobInfo, NodeInfo, Slurm
from launch.slurm.end import End, codes_of_ranks, end, end_of, note_end
from launch.slurm.end import main as end_of_start
from launch.slurm.excludes import exclude, excluded_now
from launch.slurm.job import Job, write_job
from launch.slurm.profile import Profile
from launch.slurm.requeue import avoid_excluded, let_back
from launch.slurm.start import Start, attempt_of, note_limit, start_of, tasks_per_node
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory
from tests.unit.launch.fake_slurm import FakeSlurm

AN_AGE_AGO = "2026-01-01T00:00:00"
START = Start("7", 1, "gpu", ("n1", "n2"), (2, 2), "2026-11-27T10:00:00+00:00")


class Nodes(Slurm):
    """A Slurm that knows nodes and one job, and notes what is done to that.

    Attributes:
        avoided: what it was told to keep the job from, each time.
    """

    def __init__(self, nodes: Sequence[NodeInfo], job: JobInfo | None = None) -> None:
        self._nodes = nodes
        self._job = job
        self.requeued: list[str] = []
        self.avoided: list[list[str]] = []

    def requeue(self, job: str) -> None:
        self.requeued.append(job)

    def avoid(self, job: str, nodes: Sequence[str]) -> None:
        self.avoided.append(list(nodes))

    def job(self, job: str) -> JobInfo | None:
        return self._job

    def hostnames(self, nodes: str) -> tuple[str, ...]:
        return tuple(nodes.split(","))

    def nodes(self, names: str | None = None) -> list[NodeInfo]:
        return [node for node in self._nodes if names is None or node.name in names.split(",")]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def begun(run: RunDirectory, start: Start = START) -> int:
    attempt = run.new_attempt()
    start.note(run, attempt)
    return attempt


@pytest.mark.parametrize(
    ("text", "tasks"), [("8", (8,)), ("2(x3)", (2, 2, 2)), ("2(x2),1", (2, 2, 1)), ("4,3", (4, 3))]
)
def test_tasks_of_each_node(text: str, tasks: tuple[int, ...]) -> None:
    assert tasks_per_node(text) == tasks


def test_a_start_is_found_again(run: RunDirectory) -> None:
    begun(run, replace(START, restart=0))
    attempt = begun(run)
    run.new_attempt()
    assert start_of(run, attempt) == START
    assert attempt_of(run, START) == attempt
    assert attempt_of(run, replace(START, restart=2)) is None
    assert START.nodes_of_ranks == ["n1", "n1", "n2", "n2"]


def test_outside_of_a_job() -> None:
    with pytest.raises(UserError, match="submit the script with sbatch"):
        Start.of_this_job(Nodes([]), {})


def job(**fields: Any) -> JobInfo:
    return JobInfo(id="7", **({"state": "COMPLETING", "restarts": 1} | fields))


def test_how_a_start_has_ended() -> None:
    now = datetime.now(UTC)
    minute_ago = now - timedelta(seconds=60)
    assert end_of(START, job(state="RUNNING")) is End.by_itself
    assert end_of(START, job(state="RESIZING")) is End.by_itself
    assert end_of(START, None) is End.by_itself
    # Slurm calls a job COMPLETING in all of these.
    assert end_of(START, job(restarts=2)) is End.requeued
    assert end_of(START, job(preempted=now)) is End.preempted
    assert end_of(START, job(started=minute_ago, time_limit_s=60)) is End.at_the_limit
    assert end_of(START, job(started=minute_ago, time_limit_s=600)) is End.cancelled
    assert end_of(START, job()) is End.cancelled


def test_codes_of_ranks(tmp_path: Path) -> None:
    for rank, code in {0: "70", 1: "137", 12: "1"}.items():
        (tmp_path / f"rank-{rank}.exit").write_text(f"{code}\n")
    (tmp_path / "rank-3.exit").write_text("")
    assert codes_of_ranks(tmp_path) == {0: 70, 1: -9, 12: 1}


def test_a_rank_that_was_killed_is_named_with_slurm_s_name_of_its_node(run: RunDirectory) -> None:
    folder = run.folder_of(begun(run))
    for rank in (0, 1, 3):
        (folder / f"rank-{rank}.log").write_text("error: rank 2 (process 4 on host9) is dead\n")
        (folder / f"rank-{rank}.exit").write_text("70\n")
    (folder / "rank-2.exit").write_text("137\n")
    failure = note_end(run, START, 137, End.by_itself)
    assert failure
    assert (failure.kind, failure.rank, failure.node) == ("killed", 2, "n2")
    (folder / "rank-2.exit").unlink()
    run.failure_of(1).unlink()
    failure = note_end(run, START, 70, End.by_itself)
    assert failure
    assert (failure.kind, failure.rank, failure.node) == ("lost rank", 2, "n2")


def test_what_is_no_failure(run: RunDirectory) -> None:
    attempt = begun(run)
    assert note_end(run, START, 0, End.cancelled) is None
    assert note_end(run, START, 0, End.preempted) is None
    run.stopped.write_text(json.dumps({"step": 3, "attempt": attempt}))
    assert note_end(run, START, 0, End.by_itself) is None
    # The marker of another attempt tells nothing of this one.
    run.stopped.write_text(json.dumps({"step": 3, "attempt": attempt + 1}))
    failure = note_end(run, START, 1, End.by_itself)
    assert failure
    assert failure.kind == "error"


def test_a_job_that_comes_to_its_limit_without_a_checkpoint_has_failed(run: RunDirectory) -> None:
    begun(run)
    failure = note_end(run, START, 0, End.at_the_limit)
    assert failure
    assert "time limit before a checkpoint" in failure.error


@pytest.mark.parametrize(
    ("node", "why"),
    [
        ({"state": "DOWN", "reason": "Not responding [root]"}, "Not responding"),
        ({"state": "IDLE", "flags": ("NOT_RESPONDING",)}, "IDLE"),
        ({"state": "IDLE", "started": datetime(2026, 11, 27, 10, 5, tzinfo=UTC)}, "started again"),
        ({"state": "IDLE", "booted": datetime(2026, 11, 27, 10, 5, tzinfo=UTC)}, "started again"),
    ],
)
def test_a_node_that_took_the_start_before_with_it_is_found_out(
    run: RunDirectory, node: dict[str, Any], why: str
) -> None:
    before = begun(run)
    slurm = Nodes([NodeInfo(name="n1", state="IDLE"), NodeInfo(name="n2", **node)])
    begin.catch_up(run, replace(START, restart=2), slurm, Profile())
    failure = read_failure(run, before)
    assert failure
    assert (failure.kind, failure.node, failure.chain) == ("node", "n2", "7")
    assert why in failure.error
    assert [entry.node for entry in excluded_now(run)] == ["n2"]


def test_a_slurmd_that_was_updated_while_the_ranks_went_on_is_not_to_blame(
    run: RunDirectory,
) -> None:
    """As it is on all nodes of a cluster, before a preemption hours later."""
    began = datetime.fromisoformat(START.began)
    updated = began + timedelta(hours=1)
    slurm = Nodes([NodeInfo(name=name, state="IDLE", started=updated) for name in ("n1", "n2")])
    beats = run.folder_of(begun(run)) / "heartbeats.json"
    beats.touch()
    os.utime(beats, (0, (updated + timedelta(hours=5)).timestamp()))
    begin.catch_up(run, replace(START, restart=2), slurm, Profile())
    assert read_failure(run, 1) is None
    os.utime(beats, (0, (updated - timedelta(minutes=2)).timestamp()))
    begin.catch_up(run, replace(START, restart=2), slurm, Profile())
    failure = read_failure(run, 1)
    assert failure
    assert failure.kind == "node"


def test_nodes_that_are_well_are_not_blamed(run: RunDirectory) -> None:
    before = begun(run)
    early = datetime(2026, 11, 27, 9, tzinfo=UTC)
    well = [
        NodeInfo(name=name, state="MIXED", booted=early, started=early) for name in ("n1", "n2")
    ]
    drained = [well[0], replace(well[1], flags=("DRAIN",), reason="maintenance")]
    for nodes in (well, drained):
        begin.catch_up(run, replace(START, restart=2), Nodes(nodes), Profile())
        assert read_failure(run, before) is None
    # Another job is another story, a start that has saved needs none, and what is known stays.
    dead = Nodes([replace(well[0], state="DOWN")])
    begin.catch_up(run, replace(START, job="8"), dead, Profile())
    assert read_failure(run, before) is None
    run.stopped.write_text(json.dumps({"step": 3, "attempt": before}))
    begin.catch_up(run, replace(START, restart=2), dead, Profile())
    assert read_failure(run, before) is None
    run.stopped.unlink()
    noted = note_failure(run, before, "7", Cause("error", 0, "n1", "known"))
    begin.catch_up(run, replace(START, restart=2), dead, Profile())
    assert read_failure(run, before) == noted


def addresses(monkeypatch: pytest.MonkeyPatch, known: dict[str, str]) -> None:
    def look_up(name: str, *_: object) -> list[Any]:
        if name not in known:
            raise socket.gaierror
        return [(None, None, None, "", (known[name], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_where_rank_0_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = Nodes([NodeInfo(name="n1", address="10.0.0.1")])
    addresses(monkeypatch, {"n1": "10.9.9.9"})
    assert begin.rendezvous(START, slurm)[0] == "n1"
    # Debian's own name for a machine in /etc/hosts, and a name that nobody knows.
    for known in ({"n1": "127.0.1.1"}, {}):
        addresses(monkeypatch, known)
        assert begin.rendezvous(START, slurm)[0] == "10.0.0.1"
    alone = replace(START, nodes=("n1",), tasks=(2,))
    assert begin.rendezvous(alone, slurm)[0] == "127.0.0.1"
    with pytest.raises(UserError, match="rank 0 would not be found"):
        begin.rendezvous(replace(START, nodes=("n1", "n2.invalid")), Nodes([NodeInfo(name="n1")]))


def test_each_attempt_has_a_port_of_its_own_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses(monkeypatch, {"n1": "10.9.9.9"})
    first = begin.rendezvous(START, Nodes([]))[1]
    assert begin.rendezvous(replace(START, restart=2), Nodes([]))[1] != first
    with socket.socket() as taken:
        taken.bind(("", first))
        taken.listen()
        assert begin.rendezvous(START, Nodes([]))[1] == first + 1


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


def submitted(run: RunDirectory, profile: Profile) -> None:
    write_job(
        run,
        Job(
            recipe="tiny",
            name="x",
            nodes=2,
            ranks_per_node=1,
            profile_name="site",
            profile=profile,
            python="python",
        ),
    )


def three_nodes() -> list[NodeInfo]:
    return [NodeInfo(name=f"n{i}", state="IDLE", partitions=("gpu",)) for i in (1, 2, 3)]


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
        codes.append(end(run, 1, slurm, "module load cuda has failed"))
    assert codes == [0, 0, 1]
    failure = read_failure(run, 3)
    assert failure
    assert (failure.node, failure.error) == ("n1", "module load cuda has failed")


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
