"""A run that is killed, or asked to stop, goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.local import rank_pids
from pretrain.run_dir import RunDirectory
from tests.ranks import ROOT, TIMEOUT_S

STEPS = 12
EVERY = 4


class Run:
    """A training command on one run directory, 2 ranks."""

    def __init__(self, shards: Path, directory: Path) -> None:
        self.directory = directory
        self.run_dir = RunDirectory(directory)
        self.command = [
            *(sys.executable, "-m", "launch.cli", "train", "tiny-hybrid-moe"),
            *("--nproc", "2", "--run-dir", str(directory), f"data.shards={shards}"),
            *(f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "parallel.ep=2"),
        ]

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, *overrides],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, *overrides: str) -> str:
        process = self.start(*overrides)
        output, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, output
        return output

    def interrupt_at(self, step: int, send: Callable[[int], None]) -> tuple[int, str]:
        """Call `send(pid of the launcher)` once `step` is logged; returns exit code and output."""
        process = self.start()
        while self.logged_steps()[-1:] < [step]:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        send(process.pid)
        output, _ = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, output

    def rows(self) -> list[dict]:
        lines = (self.directory / "metrics.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def logged_steps(self) -> list[int]:
        if not (self.directory / "metrics.jsonl").exists():
            return []
        return [row["train/step"] for row in self.rows()]

    def curve(self) -> list[tuple]:
        keys = ("train/step", "train/loss", "train/aux_loss", "train/grad_norm", "train/tokens")
        return [tuple(row[key] for key in keys) for row in self.rows()]


@pytest.fixture(scope="module")
def uninterrupted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(shards, tmp_path_factory.mktemp("whole") / "run")
    run.finish()
    return run


def test_killed_at_three_steps_it_resumes_bitwise(
    shards: Path, tmp_path: Path, uninterrupted: Run
) -> None:
    run = Run(shards, tmp_path / "run")
    for step, rank in ((2, 1), (6, 0), (9, 1)):
        code, output = run.interrupt_at(
            step, lambda _, rank=rank: os.kill(rank_pids(run.run_dir)[rank], signal.SIGKILL)
        )
        assert code == 1, output
        assert "signal 9" in output or "failed" in output
        assert not (run.directory / "done.json").exists()
    run.finish()
    assert run.curve() == uninterrupted.curve()
    assert (run.directory / "done.json").exists()
    assert len(list((run.directory / "attempts").iterdir())) == 4


def test_asked_to_stop_it_saves_and_says_so(
    shards: Path, tmp_path: Path, uninterrupted: Run
) -> None:
    run = Run(shards, tmp_path / "run")
    code, output = run.interrupt_at(5, lambda pid: os.kill(pid, signal.SIGTERM))
    assert code == 75, output
    saved = [path.name for path in (run.directory / "checkpoints").iterdir()]
    assert f"step-{run.logged_steps()[-1]:08d}" in saved
    run.finish()
    assert run.curve() == uninterrupted.curve()


def test_a_finished_run_can_be_made_longer_but_not_another(uninterrupted: Run) -> None:
    before = uninterrupted.curve()
    uninterrupted.finish()
    assert uninterrupted.curve() == before
    uninterrupted.finish(f"train.steps={STEPS + 2}", "schedule.name=cosine")
    assert uninterrupted.curve()[:STEPS] == before
    assert uninterrupted.logged_steps() == list(range(1, STEPS + 3))

    process = uninterrupted.start("model.d_model=64")
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2
    assert "model.d_model: 128 -> 64" in output


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    shards: Path, tmp_path: Path, uninterrupted: Run
) -> None:
    run = Run(shards, tmp_path / "run")
    run.finish()
    newest = max((run.directory / "checkpoints").iterdir())
    largest = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    output = run.finish()
    assert largest.name in output
    assert run.curve() == uninterrupted.curve()[:STEPS]
