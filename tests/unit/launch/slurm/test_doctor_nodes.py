"""What the doctor says of disks, versions, the shared folder and the all-reduce."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch.slurm.doctor import bandwidth, disk, shared_folder, versions
from launch.slurm.doctor.bandwidth import Bandwidth
from launch.slurm.doctor.disk import Disk, Folder
from launch.slurm.doctor.shared_folder import Board, Seen

GIB = 1 << 30


def _disk(**changed: object) -> Disk:
    usual = {"path": "/scratch", "why": "compiled kernels", "wants": GIB, "size": 100 * GIB}
    return Disk(**usual | {"free": 50 * GIB, "free_files": 10**6} | changed)  # type: ignore[arg-type]


def test_a_folder_with_room_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    measured = disk.measure(Folder(path=str(tmp_path), why="kernels", wants=1))
    assert measured.error is None
    assert 0 < measured.free <= measured.size
    made = Folder(path=str(tmp_path / "made for ranks"), why="kernels", wants=1, made=True)
    assert disk.measure(made).error is None
    assert list(tmp_path.iterdir()) == []
    assert disk.check({"a1": [measured]}).findings == ()


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    measured = disk.measure(Folder(path=str(tmp_path / "no"), why="runs", wants=1))
    (finding,) = disk.check({"a1": [measured], "a2": [_disk()]}).findings
    assert finding.where == "a1"
    assert "no (runs) cannot be written: No such file or directory" in finding.what


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_folder_is_full_if_nothing_can_be_written_whatever_it_says_is_free(
    number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuses(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuses)
    measured = disk.measure(Folder(path=str(tmp_path), why="kernels", wants=1))
    (finding,) = disk.check({"a1": [measured]}).findings
    assert f"(kernels) is full: {os.strerror(number)}" in finding.what


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"free": GIB // 2}, "has 512 MiB free of 100.0 GiB; 1.0 GiB are wanted"),
        ({"free_files": 7}, "can hold 7 more files only"),
        ({"free_files": None}, None),
    ],
)
def test_little_room_is_found_for_bytes_and_for_files(
    changed: dict[str, object], says: str | None
) -> None:
    findings = disk.check({"a1": [_disk()], "a2": [_disk(**changed)]}).findings
    assert [finding.where for finding in findings] == ["a2"] * bool(says)
    assert all(str(says) in finding.what for finding in findings)


def test_nodes_with_the_same_trouble_are_told_together() -> None:
    measured = {f"a{number}": [_disk(free=0)] for number in range(1, 12)}
    (finding,) = disk.check(measured).findings
    assert finding.where == "a1, a2, a3, a4 and 7 more"


def test_versions_that_differ_name_the_few_and_what_the_others_have() -> None:
    usual = {"python": "3.11.2", "torch": "2.13.0", "numpy": "2.3.0"}
    measured = {f"a{number}": usual for number in range(1, 5)}
    assert versions.check(measured).findings == ()
    measured["a2"] = usual | {"torch": "2.11.0"}
    measured["a3"] = {name: usual[name] for name in ("python", "torch")}
    findings = versions.check(measured).findings
    assert [(finding.where, finding.what) for finding in findings] == [
        ("a2", "other versions than the rest: torch 2.11.0, elsewhere 2.13.0"),
        ("a3", "other versions than the rest: numpy none, elsewhere 2.3.0"),
    ]


def test_many_differences_are_one_finding() -> None:
    measured = {
        node: {f"package-{number}": version for number in range(30)}
        for node, version in (("a1", "1"), ("a2", "1"), ("a3", "2"))
    }
    (finding,) = versions.check(measured).findings
    assert finding.what.endswith(
        "package-10 2, elsewhere 1; package-11 2, elsewhere 1; and 26 more"
    )


def test_what_runs_here_is_measured() -> None:
    measured = versions.measure()
    assert (
        measured["torch"]
        == subprocess.check_output(
            [sys.executable, "-c", "import importlib.metadata as m; print(m.version('torch'))"],
            text=True,
        ).strip()
    )
    assert {"python", "farspan", "numpy", "libc"} <= measured.keys()


def test_sources_that_differ_by_a_byte_have_another_hash(tmp_path: Path) -> None:
    for folder in versions.OURS:
        (tmp_path / folder).mkdir()
    source = tmp_path / "launch" / "here.py"
    source.write_text("one = 1\n")
    before = versions.hash_of_sources(tmp_path)
    source.write_text("one = 2\n")
    assert versions.hash_of_sources(tmp_path) != before


def _seen(**changed: object) -> Seen:
    return Seen(**{"missing": (), "lags": {"a1": 0.1}, "lock": "refused"} | changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "where", "says"),
    [
        ({"missing": ("a1",)}, "a1", "what it writes to /runs is not seen on a2"),
        ({"lags": {"a1": 20.0}}, "a2", "that a1 had replaced still read as before, for 20 s"),
        ({"lags": {"a1": None}}, "a2", "still read as before, for 60 s"),
        ({"lock": "granted"}, "a2", "it gets a lock in /runs that another node holds"),
        ({"lock": "Function not implemented"}, "a2", "locks do not work in /runs: Function not"),
    ],
)
def test_a_folder_that_is_not_really_shared_is_found(
    changed: dict[str, object], where: str, says: str
) -> None:
    measured = {"a1": _seen(lock=None), "a2": _seen(**changed), "a3": _seen()}
    (finding,) = shared_folder.check(measured, Path("/runs")).findings
    assert finding.where == where
    assert says in finding.what
    healthy = {"a1": _seen(lock=None), "a2": _seen(), "a3": _seen()}
    assert shared_folder.check(healthy, Path("/runs")).findings == ()


def test_nodes_wait_for_each_other_and_see_a_file_that_is_replaced(tmp_path: Path) -> None:
    here, there = Board(tmp_path, "a1"), Board(tmp_path, "a2")
    here.write(1, address="10.0.0.1")
    assert here.wait(["a1", "a2"], 1, 0.0) == ["a2"]
    there.write(1)
    assert here.wait(["a1", "a2"], 1, 0.0) == []
    assert there.read("a1")["address"] == "10.0.0.1"
    assert there.lag("a1", 1) == 0.0
    later = threading.Timer(0.2, here.write, (2,))
    later.start()
    lag = there.lag("a1", 2)
    later.join()
    assert lag is not None
    assert lag >= 0.1


def test_a_lock_that_another_process_holds_is_refused_until_it_ends(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with shared_folder.hold(lock):
        assert shared_folder.try_lock(lock) == "refused"
    assert shared_folder.try_lock(lock) == "granted"


def _bandwidth(**changed: object) -> Bandwidth:
    usual = {"backend": "nccl", "ranks": 16, "bytes_reduced": 1 << 29, "seconds": 0.004}
    return Bandwidth(**usual | {"is_right": True} | changed)  # type: ignore[arg-type]


def test_bandwidth_is_that_of_the_bus_as_nccl_tests_counts_it() -> None:
    assert _bandwidth().gb_per_s() == pytest.approx((1 << 29) / 0.004 * 2 * 15 / 16 / 1e9)
    assert _bandwidth(ranks=1).gb_per_s() == 0


def test_an_all_reduce_below_the_floor_or_with_a_wrong_sum_is_found() -> None:
    assert bandwidth.check(_bandwidth(), "", None).findings == ()
    assert bandwidth.check(_bandwidth(), "", 200).findings == ()
    (finding,) = bandwidth.check(_bandwidth(), "", 400).findings
    assert finding.what == "252 GB/s, less than the 400 GB/s of the profile"
    (finding,) = bandwidth.check(_bandwidth(is_right=False), "", None).findings
    assert finding.what == "the sum over 16 ranks by nccl is wrong"


def test_an_all_reduce_that_failed_is_told_with_its_last_words() -> None:
    (finding,) = bandwidth.check(None, "3: DistStoreError: timed out", None).findings
    assert finding.what.endswith("has failed: 3: DistStoreError: timed out")
