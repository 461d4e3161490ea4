"""Attempts of a run: restarted when a rank dies, fenced off when another has taken over."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.stream import Source, TokenStream
from launch.local import rank_pids
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.store import checkpoint_in
from pretrain.checkpoint.trained import checkpoints_of
from pretrain.config import read_run_config
from pretrain.run_dir import RunDirectory
from tests.ranks import ROOT
from tests.resume.test_kill import Run, outcome

ALONE = ("--nproc", "1", "parallel.ep=1", "wandb.mode=disabled")
STEPS = 12


def wait_for(process: subprocess.Popen[str], condition) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def has_ranks(run: Run, attempt: int) -> bool:
    return (run.run_dir.folder_of(attempt) / "pids.json").exists()


def test_ranks_that_are_killed_are_started_again_and_the_losses_are_those_of_a_whole_run(
    shards: Path, tmp_path: Path, uninterrupted: Run
) -> None:
    run = Run(shards, tmp_path / "run")
    process = run.start("--max-restarts", "1")
    for attempt, step, rank in ((1, 5, 1), (2, 9, 0)):
        wait_for(process, lambda attempt=attempt: has_ranks(run, attempt))
        wait_for(process, lambda step=step: run.has_reached(step))
        os.kill(rank_pids(run.run_dir)[rank], signal.SIGKILL)
    code, output = outcome(process)
    assert code == 0, output
    assert run.curve() == uninterrupted.curve()
    for attempt, rank in ((1, 1), (2, 0)):
        assert output.count(f"rank {rank} was killed by signal 9") == 1
        assert output.count(f"restarting, attempt {attempt + 1} of {run.directory}") == 1
        assert {log.name for log in run.run_dir.folder_of(attempt).glob("*.log")} == {
            "rank-0.log",
            "rank-1.log",
        }
    assert json.loads(run.run_dir.done.read_text()) == {"step": STEPS, "attempt": 3}
    assert run.audit()["attempts"] == 3


def contents(run: RunDirectory) -> dict[str, bytes]:
    return {
        str(path.relative_to(run.root)): path.read_bytes()
        for path in run.root.rglob("*")
        if path.is_file() and path.parent != run.folder_of(1)
    }


@pytest.mark.slow
def test_an_attempt_that_comes_back_after_another_took_over_changes_nothing(
    shards: Path, tmp_path: Path
) -> None:
    run = Run(shards, tmp_path / "run")
    first = run.start_and_reach(6, *ALONE, "--max-restarts", "3")
    processes = [first.pid, *rank_pids(run.run_dir)]
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    # On another machine, to which the locks do not reach, there are none.
    for lock in run.directory.glob("*lock"):
        lock.unlink()
    run.finish(*ALONE)
    assert run.logged_steps() == list(range(1, STEPS + 1))
    before = contents(run.run_dir)
    for process in reversed(processes):
        os.kill(process, signal.SIGCONT)
    code, output = outcome(first)
    assert code == 1, output
    assert f"attempt 2 of {run.directory} has begun" in output
    assert "restarting" not in output
    assert "Traceback" not in output
    assert contents(run.run_dir) == before


@pytest.mark.slow
def test_requests_to_stop_may_come_early_late_and_repeatedly(shards: Path, tmp_path: Path) -> None:
    run = Run(shards, tmp_path / "run")
    process = run.start_and_reach(0, *ALONE)
    while process.poll() is None:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            process.send_signal(number)
        time.sleep(0.05)
    code, output = outcome(process)
    assert code == 75, output
    assert "Traceback" not in output
    stopped = json.loads(run.run_dir.stopped.read_text())
    assert stopped["step"] == run.logged_steps()[-1] < STEPS
    assert (stopped["attempt"], stopped["reason"]) == (1, "asked to stop by SIGTERM")

    process = run.start(*ALONE)
    while process.poll() is None:
        # The last step, the final checkpoint, the marker, the report.
        if run.has_reached(STEPS):
            process.send_signal(signal.SIGUSR2)
        time.sleep(0.01)
    code, output = outcome(process)
    assert code == 0, output
    assert "Traceback" not in output
    assert run.run_dir.done.exists()
    assert not run.run_dir.stopped.exists()
    assert run.run_dir.report.exists()


def test_a_run_directory_that_vanishes_ends_the_run_in_words(shards: Path, tmp_path: Path) -> None:
    run = Run(shards, tmp_path / "run")
    process = run.start_and_reach(2, *ALONE, "--max-restarts", "3")
    run.directory.rename(tmp_path / "elsewhere")
    code, output = outcome(process)
    assert code == 1, output
    assert f"error: the run directory {run.directory} is gone" in output
    assert "Traceback" not in output
    assert "restarting" not in output
    assert not run.directory.exists()


def test_another_batch_and_row_length_are_refused_and_if_allowed_go_on_with_the_next_unseen_token(
    shards: Path, tmp_path: Path
) -> None:
    run = Run(shards, tmp_path / "run")
    run.finish(*ALONE, "train.steps=4")
    other = ("train.steps=7", "train.global_batch=4", "data.seq_len=128")
    output = run.finish(*ALONE, *other, code=2)
    assert "data.seq_len: 256 -> 128\n  train.global_batch: 8 -> 4" in output
    allow = ("--allow-change", "train.global_batch", "--allow-change", "data.seq_len")
    output = run.finish(*ALONE, *other, *allow)
    assert "allowed: train.global_batch: 8 -> 4" in output

    before = TokenStream([Source(str(shards), 1.0)], 256, seed=0)
    for _ in range(4):
        before.next_batch(8)
    after = TokenStream([Source(str(shards), 1.0)], 128, seed=0)
    after.load_state_dict(before.state_dict())
    for _ in range(3):
        after.next_batch(4)
    checkpoints = checkpoints_of(read_run_config(run.run_dir), run.run_dir)
    progress = Manifest.read(checkpoint_in(checkpoints, 7)).progress
    assert progress["stream"] == after.state_dict()
    assert progress["tokens"] == 4 * 8 * 256 + 3 * 4 * 128
    noted = (run.run_dir.folder_of(2) / "changes.jsonl").read_text()
    assert '"setting": "data.seq_len", "before": 256, "now": 128' in noted


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds torchrun's ranks in /proc")
def test_torchrun_restarts_a_killed_rank_and_not_a_run_that_stopped_on_request(
    shards: Path, tmp_path: Path
) -> None:
    run = Run(shards, tmp_path / "run")
    run.finish("--prepare-only", "train.steps=1000", "checkpoint.every=4")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("--max-restarts=3", "-m", "pretrain.train", str(run.directory)),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(process, lambda: run.has_reached(5))
    os.kill(processes_of(run, process.pid)[1], signal.SIGKILL)
    wait_for(process, lambda: run.run_dir.current_attempt() == 2)
    wait_for(process, lambda: run.has_reached(10))
    os.kill(processes_of(run, process.pid)[1], signal.SIGUSR2)
    code, output = outcome(process)
    assert code == 0, output
    stopped = json.loads(run.run_dir.stopped.read_text())
    assert (stopped["attempt"], stopped["step"]) == (2, run.logged_steps()[-1])
    assert stopped["reason"] == "another rank was asked to stop"
    assert not run.run_dir.done.exists()


def processes_of(run: Run, launcher: int) -> list[int]:
    """The ranks that a torchrun has started, by rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().decode()
        if found := re.search(r"(?:^|\0)RANK=(\d+)", environment):
            ranks[int(found[1])] = int(child)
    return [ranks[rank] for rank in sorted(ranks)]
