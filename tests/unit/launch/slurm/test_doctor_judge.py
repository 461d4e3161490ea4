"""What the doctor makes of the files that a job has left."""

from pathlib import Path

import pytest

from launch.slurm.client import NodeInfo
from launch.slurm.doctor.adapters import Adapters
from launch.slurm.doctor.bandwidth import Bandwidth
from launch.slurm.doctor.disk import Disk
from launch.slurm.doctor.gpus import Gpus
from launch.slurm.doctor.judge import judge
from launch.slurm.doctor.names import Names
from launch.slurm.doctor.network import Reached
from launch.slurm.doctor.node import Folder, Meeting, OfNode, OfRank
from launch.slurm.doctor.shared_folder import Seen
from launch.slurm.profile import Network, Profile

PROFILE = Profile(gpus="none", ranks_per_node=2)
ADDRESSES = {"a1": "10.0.0.1", "a2": "10.0.0.2", "a3": "10.0.0.3"}
NODES = [NodeInfo(name=name, version="23.11") for name in ADDRESSES]


def _node(node: str, signalled: bool = True) -> OfNode:
    found = {name: (address,) for name, address in ADDRESSES.items()}
    reached = [
        Reached(node=other, address=address, port=40000)
        for other, address in ADDRESSES.items()
        if other != node
    ]
    return OfNode(
        names=Names(hostname=node, own=found[node], found=found, interfaces={}),
        adapters=Adapters(ports={"mlx5_0:1": "ACTIVE"}, lockable=None),
        versions={"torch": "2.13.0"},
        disks=(Disk(path="/tmp", why="temporary files", wants=1, free=2, size=3),),
        reached=tuple(reached),
        taken=None,
        seen=Seen(missing=(), lags={}, lock=None if node == "a1" else "refused"),
        signalled=signalled,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Of a job of three nodes with two ranks each, all of which are well."""
    folder = Folder(tmp_path)
    meeting = Meeting(addresses=ADDRESSES, tasks=(2, 2, 2), interface=None, folders=())
    folder.meeting.write_text(meeting.model_dump_json())
    folder.ranks.mkdir()
    folder.ready.touch()
    for rank in range(6):
        node = f"a{rank // 2 + 1}"
        of_node = None if rank % 2 else _node(node)
        _write(folder, OfRank(rank=rank, node=node, gpus=Gpus(), of_node=of_node))
    _measure_bandwidth(folder)
    return folder


def _write(folder: Folder, of_rank: OfRank) -> None:
    (folder.ranks / f"{of_rank.rank}.json").write_text(of_rank.model_dump_json())


def _measure_bandwidth(folder: Folder) -> None:
    measured = Bandwidth(
        backend="nccl", ranks=6, bytes_reduced=1 << 20, seconds=0.001, is_right=True
    )
    folder.bandwidth.write_text(measured.model_dump_json())


def _findings(folder: Folder, profile: Profile = PROFILE) -> list[tuple[str, str, str]]:
    return [
        (check.name, finding.where, finding.what)
        for check in judge(folder, profile, NODES)
        for finding in check.findings
    ]


def test_nodes_that_are_well_are_looked_at_from_all_sides(folder: Folder) -> None:
    checks = judge(folder, PROFILE, NODES)
    assert [check for check in checks if check.findings] == []
    names = "ranks names ports clocks versions disk shared-folder signals GPUs all-reduce"
    assert [check.name.replace(" ", "-") for check in checks] == names.split()


def test_a_node_that_could_not_measure_is_named_with_its_last_words(folder: Folder) -> None:
    for rank in (2, 3):
        (folder.ranks / f"{rank}.json").unlink()
    folder.log("node").write_text(
        "0: a word of another rank\n"
        "2: Traceback (most recent call last):\n"
        "2: FileNotFoundError: [Errno 2] No such file or directory: '/shared/meeting.json'\n"
        "12: OSError: of another rank\n"
    )
    assert _findings(folder) == [
        (
            "ranks",
            "a2",
            "rank 2, 3 could not measure: 2: FileNotFoundError: [Errno 2] No such file or "
            "directory: '/shared/meeting.json'",
        )
    ]


def test_a_job_that_did_not_get_so_far_is_told_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "job.log").write_text("/opt/python: error: no module named launch\n")
    (finding,) = _findings(Folder(tmp_path))
    assert finding[1:] == (
        "the job",
        "it has measured nothing: /opt/python: error: no module named launch",
    )


def test_a_slurmd_of_another_version_is_found(folder: Folder) -> None:
    nodes = [*NODES[:2], NodeInfo(name="a3", version="22.05")]
    found = [finding for check in judge(folder, PROFILE, nodes) for finding in check.findings]
    assert [(one.where, one.what) for one in found] == [
        ("a3", "other versions than the rest: slurmd 22.05, elsewhere 23.11")
    ]


def test_a_node_that_the_request_to_stop_does_not_reach_is_found(folder: Folder) -> None:
    deaf = OfRank(rank=4, node="a3", gpus=Gpus(), of_node=_node("a3", signalled=False))
    _write(folder, deaf)
    (finding,) = _findings(folder)
    assert finding[:2] == ("signals", "a3")
    # Nobody is deaf to what was not sent.
    folder.ready.unlink()
    assert _findings(folder) == []


def test_the_floor_of_the_bandwidth_is_that_of_the_profile(folder: Folder) -> None:
    fast = PROFILE.model_copy(update={"network": Network(all_reduce_gb_per_s=100)})
    (finding,) = _findings(folder, fast)
    assert finding[2].startswith("1.75 GB/s, less than the 100 GB/s of the profile")


def test_adapters_are_looked_at_where_nccl_uses_them(folder: Folder) -> None:
    network = Network(hcas="mlx5_1")
    on_cpus = PROFILE.model_copy(update={"network": network})
    assert _findings(folder, on_cpus) == []
    on_gpus = on_cpus.model_copy(update={"gpus": "gres"})
    found = [finding for finding in _findings(folder, on_gpus) if finding[0] == "adapters"]
    assert [finding[1] for finding in found] == ["a1, a2, a3"]


def test_an_all_reduce_is_missed_only_if_its_ranks_could_have_met(folder: Folder) -> None:
    folder.bandwidth.unlink()
    folder.log("bandwidth").write_text("3: RuntimeError: NCCL error: unhandled system error\n")
    (finding,) = _findings(folder)
    assert finding[2].endswith("has failed: 3: RuntimeError: NCCL error: unhandled system error")
    folder.unreachable.touch()
    assert _findings(folder) == []
