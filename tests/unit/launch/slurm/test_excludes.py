"""Which nodes a run avoids, and for how long."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from launch.causes import Cause, Kind
from launch.failures import Failure, note_failure
from launch.slurm.client import JobInfo, NodeInfo
from launch.slurm.excludes import (
    Excluded,
    avoidable,
    exclude,
    excluded_now,
    learn,
    nodes_to_avoid,
    read_excluded,
)
from launch.slurm.profile import Profile
from pretrain.run_dir import RunDirectory

HOUR = 3600


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def fail(run: RunDirectory, kind: Kind, node: str, error: str = "it failed") -> Failure:
    failure = note_failure(run, None, "7", Cause(kind, 1, node, error))
    learn(run, failure, HOUR)
    return failure


def names(run: RunDirectory) -> list[str]:
    return [entry.node for entry in excluded_now(run)]


def test_a_node_that_fails_is_avoided_at_once(run: RunDirectory) -> None:
    fail(run, "node", "n1", "the node has failed: Not responding")
    assert names(run) == ["n1"]
    assert excluded_now(run)[0].why == "attempt 1: the node has failed: Not responding"


@pytest.mark.parametrize(
    "error",
    [
        "RuntimeError: CUDA error: uncorrectable ECC error encountered",
        "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus",
        "OSError: [Errno 5] Input/output error",
        "rank 1 does not answer (stopped, or cut off)",
    ],
)
def test_broken_hardware_is_avoided_at_once(run: RunDirectory, error: str) -> None:
    fail(run, "error", "n1", error)
    assert names(run) == ["n1"]


def test_a_rank_that_is_killed_is_the_node_s_fault_when_it_happens_there_again(
    run: RunDirectory,
) -> None:
    fail(run, "killed", "n1")
    fail(run, "killed", "n2")
    assert names(run) == []
    fail(run, "hang", "n1")
    assert names(run) == ["n1"]
    assert excluded_now(run)[0].why.startswith("attempts 1 and 3: ")


@pytest.mark.parametrize("kind", ["mistake", "final", "error", "memory"])
def test_what_the_run_does_wrong_is_not_the_node_s_fault(run: RunDirectory, kind: Kind) -> None:
    fail(run, kind, "n1")
    fail(run, kind, "n1")
    assert names(run) == []


def test_a_node_comes_back(run: RunDirectory) -> None:
    exclude(run, "n1", "broken", -1)
    exclude(run, "n2", "broken", HOUR)
    assert names(run) == ["n2"]
    assert [entry.node for entry in read_excluded(run)] == ["n1", "n2"]
    exclude(run, "n1", "again", HOUR)
    assert names(run) == ["n2", "n1"]


def test_a_profile_may_avoid_none(run: RunDirectory) -> None:
    learn(run, replace(fail(run, "error", ""), node="n1", kind="node"), 0)
    assert names(run) == []


def test_a_file_that_cannot_be_read_is_as_good_as_none(run: RunDirectory) -> None:
    run.excluded.write_text('[{"node": "n')
    assert names(run) == []


def entries(*nodes: str) -> list[Excluded]:
    return [Excluded(node, "broken", "2026-11-27T10:00:00+00:00", "x") for node in nodes]


def nodes_of(*names: str, features: Sequence[str] = ()) -> list[NodeInfo]:
    return [
        NodeInfo(name=name, state="IDLE", partitions=("gpu",), features=tuple(features))
        for name in names
    ]


def test_a_job_is_left_as_many_nodes_as_it_needs() -> None:
    four = nodes_of("n1", "n2", "n3", "n4")
    broken = entries("n1", "n2", "n3")
    # The newest ones first.
    for needed, wanted in ((1, {"n1", "n2", "n3"}), (2, {"n2", "n3"}), (3, {"n3"}), (4, set())):
        kept = avoidable(broken, four, needed, "gpu")
        assert {entry.node for entry in kept} == wanted
    assert avoidable(broken, four, 1, "other") == []


def test_a_node_that_is_down_costs_a_job_nothing() -> None:
    nodes = [*nodes_of("n1", "n2"), NodeInfo(name="n3", state="DOWN", partitions=("gpu",))]
    kept = avoidable(entries("n3"), nodes, 2, "gpu")
    assert [entry.node for entry in kept] == ["n3"]


def test_only_nodes_that_a_job_could_have_count_as_others() -> None:
    nodes = [*nodes_of("n1", "n2", features=["ib"]), *nodes_of("n3", "n4")]
    ib = Profile(constraint="ib")
    assert avoidable(entries("n1"), nodes, 2, "gpu", ib) == []
    assert avoidable(entries("n1"), nodes, 1, "gpu", ib) != []
    # Which nodes have one of several features, Slurm knows.
    assert avoidable(entries("n1"), nodes, 2, "gpu", Profile(constraint="ib|a100")) != []


def test_nodes_that_are_too_small_do_not_take_the_place_of_one_that_is_avoided() -> None:
    def node(name: str, gpus: int) -> NodeInfo:
        return NodeInfo(name=name, state="IDLE", cpus=8, gpus=gpus, partitions=("gpu",))

    nodes = [node("n1", 8), node("n2", 8), *(node(f"cpu{n}", 0) for n in range(9))]
    needs = Profile(gpus="gpus-per-node", ranks_per_node=8, cpus_per_rank=1)
    assert avoidable(entries("n1"), nodes, 2, "gpu", needs) == []
    assert avoidable(entries("n1"), nodes, 1, "gpu", needs) != []


def test_what_its_owner_excludes_stays_excluded() -> None:
    job = JobInfo(id="7", excluded=("mine", "n1", "n2"))
    known, now = entries("n1", "n2"), entries("n2")
    assert nodes_to_avoid(job, known, now) == ["mine", "n2"]
