"""A run whose disk is full says which file has no room, and goes on when there is some."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disks import SmallDisk
from tests.resume.test_kill import EVERY, Run, outcome

FULL = "cannot be written: No space left on device"
ROOM_LEFT = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if sys.platform != "linux":
        pytest.skip("mounts a tmpfs")
    try:
        small = SmallDisk(tmp_path / "disk", "256m")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"may not mount a tmpfs: {error.stderr}")
    yield small
    small.unmount()


@pytest.mark.slow
def test_it_ends_with_the_name_of_the_file_and_once_there_is_room_goes_on_with_each_step_once(
    shards: Path, disk: SmallDisk
) -> None:
    run = Run(shards, disk.folder / "run")
    alone = ("--nproc", "1", "parallel.ep=1", "data.seq_len=64", "wandb.mode=disabled")
    run.finish(*alone, f"train.steps={EVERY}")
    # No checkpoint in the background, whose files make room when they do not fit.
    endless = (*alone, "train.steps=100000", "checkpoint.every=100000", "--max-restarts", "3")
    process = run.start_and_reach(EVERY + 1, *endless)
    logs = run.run_dir.folder_of(2).glob("*.log")
    for file in (run.run_dir.ledger, *logs):
        disk.reserve(file, ROOM_LEFT)
    disk.fill()
    code, output = outcome(process)
    assert code == 1, output
    assert f"error: {run.run_dir.metrics} {FULL}" in output
    assert "Traceback" not in output
    assert "restarting" not in output
    before, steps = run.curve(), run.logged_steps()
    assert steps == list(range(1, steps[-1] + 1))
    assert run.run_dir.metrics.read_bytes().endswith(b"}\n")

    output = run.finish(*endless, code=1)
    assert f"error: {run.run_dir.root}/" in output
    assert FULL in output
    assert "Traceback" not in output

    disk.make_room()
    run.finish(*alone, f"train.steps={steps[-1] + 1}")
    assert run.logged_steps() == [*steps, steps[-1] + 1]
    assert run.curve()[:-1] == before
    assert run.audit()["undone_by_restarts"]["steps"] >= 1
