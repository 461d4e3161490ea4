"""How a start of a job finds out where it is and how it has ended."""

import json
import os
import socket
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from launch.causes import Cause
from launch.failures import note_failure, read_failure
from launch.slurm import begin
from launch.slurm.client import NodeInfo
from launch.slurm.end import End, codes_of_ranks, end_of, note_end
from launch.slurm.excludes import excluded_now
from launch.slurm.profile import Profile
from launch.slurm.start import Start, attempt_of, start_of, tasks_per_node
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory
from tests.unit.launch.slurm.starts import (
    START,
    Nodes,
    addresses,
    begun,
    job,
)


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
