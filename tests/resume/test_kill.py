"""A run that is killed, or asked to stop, goes on as if nothing had happened."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import rank_pids
from pretrain.run_dir import RunDirectory
from tests.ranks import ROOT, TIMEOUT_S

STEPS = 12
EVERY = 4
HANG_TIMEOUT_S = 15


class Run:
    """A training command on one run directory, 2 ranks."""

    def __init__(self, shards: Path, directory: Path) -> None:
        self.directory = directory
        self.run_dir = RunDirectory(directory)
        self.command = [
            *(sys.executable, "-m", "launch.cli", "train", "tiny-hybrid-moe"),
            *("--nproc", "2", "--run-dir", str(directory), f"data.shards={shards}"),
            *(f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "parallel.ep=2"),
            *("schedule.name=constant", "--max-restarts", "0"),
        ]

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, *overrides],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, *overrides: str, code: int = 0) -> str:
        process = self.start(*overrides)
        output, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == code, output
        return output

    def audit(self) -> dict:
        """What `farspan audit` says, once it has found that everything holds."""
        command = [sys.executable, "-m", "launch.cli", "audit", str(self.directory), "--json"]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def start_and_reach(self, step: int, *overrides: str) -> subprocess.Popen[str]:
        """Start, and return once `step` is logged (0: once the ranks are there)."""
        process = self.start(*overrides)
        while not self.has_reached(step):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        return process

    def has_reached(self, step: int) -> bool:
        if step:
            return self.logged_steps()[-1:] >= [step]
        return (self.directory / "attempts" / "0001" / "pids.json").exists()

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


def outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, output


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_with_a_rank_killed_or_hanging_it_names_the_rank_and_resumes_bitwise(
    shards: Path, tmp_path: Path, uninterrupted: Run
) -> None:
    run = Run(shards, tmp_path / "run")
    for attempt, (step, rank, number, how) in enumerate(
        (
            (2, 1, signal.SIGKILL, "is dead"),
            (6, 0, signal.SIGKILL, "is dead"),
            (9, 1, signal.SIGSTOP, "does not answer"),
            (10, 0, signal.SIGSTOP, "is dead, stopped or cut off, and the job's store with it"),
        ),
        start=1,
    ):
        # A busy machine must not make a rank that only waits look like one that hangs.
        impatient = (f"train.hang_timeout_s={HANG_TIMEOUT_S}",) if number == signal.SIGSTOP else ()
        process = run.start_and_reach(step, *impatient)
        pid = rank_pids(run.run_dir)[rank]
        os.kill(pid, number)
        code, output = outcome(process)
        assert code == 1, output
        if number == signal.SIGKILL:
            assert f"rank {rank} was killed by signal 9" in output
        survivor = rf"noticed by rank {1 - rank} in \w+ (in backward )?.* at step \d+"
        assert re.search(
            rf"error: rank {rank} \(process {pid} on \S+\) {how}.*; {survivor}", output
        ), output
        assert output.count("noticed by rank") == 1
        stacks = run.run_dir.folder_of(attempt) / "stacks" / f"rank-{1 - rank}.txt"
        assert "stacks of all threads" in stacks.read_text()
        assert not (run.directory / "done.json").exists()
    run.finish()
    assert run.curve() == uninterrupted.curve()
    assert (run.directory / "done.json").exists()
    assert len(list((run.directory / "attempts").iterdir())) == 5
    audit = run.audit()
    assert (audit["attempts"], audit["steps"]) == (5, STEPS)
    assert audit["undone_by_restarts"]["steps"] >= 4
    assert audit["trained_tokens"] == run.rows()[-1]["train/tokens"]


@pytest.mark.parametrize("step", [0, 5])
def test_asked_to_stop_it_saves_and_goes_on_later(
    shards: Path, tmp_path: Path, uninterrupted: Run, step: int
) -> None:
    run = Run(shards, tmp_path / "run")
    process = run.start_and_reach(step)
    process.send_signal(signal.SIGTERM)
    code, output = outcome(process)
    assert code == 75, output
    saved = [path.name for path in (run.directory / "checkpoints").iterdir()]
    assert f"step-{run.logged_steps()[-1]:08d}" in saved
    run.finish()
    assert run.curve() == uninterrupted.curve()


def test_ranks_do_not_outlive_their_launcher_and_nobody_trains_beside_them(
    shards: Path, tmp_path: Path, uninterrupted: Run
) -> None:
    run = Run(shards, tmp_path / "run")
    process = run.start_and_reach(2)
    ranks = rank_pids(run.run_dir)
    os.kill(ranks[0], signal.SIGSTOP)
    assert "is in use by process" in run.finish(code=2)
    process.kill()
    process.communicate(timeout=TIMEOUT_S)
    os.kill(ranks[0], signal.SIGCONT)
    deadline = time.monotonic() + TIMEOUT_S
    while any(map(is_alive, ranks)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.finish()
    assert run.curve() == uninterrupted.curve()


def test_it_resumes_on_another_layout(shards: Path, tmp_path: Path, uninterrupted: Run) -> None:
    run = Run(shards, tmp_path / "run")
    process = run.start_and_reach(6)
    process.send_signal(signal.SIGTERM)
    assert outcome(process)[0] == 75
    run.finish("--nproc", "1", "parallel.ep=1", "train.microbatch=4")
    losses = [row["train/loss"] for row in run.rows()]
    expected = [row["train/loss"] for row in uninterrupted.rows()]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert run.audit()["undone_by_restarts"]["steps"] == 0


def copy_of(run: Run, shards: Path, directory: Path) -> Run:
    shutil.copytree(run.directory, directory)
    return Run(shards, directory)


def test_a_finished_run_can_be_made_longer_but_not_shorter_or_another(
    shards: Path, tmp_path: Path, uninterrupted: Run
) -> None:
    run = copy_of(uninterrupted, shards, tmp_path / "run")
    run.finish()
    assert run.curve() == uninterrupted.curve()
    run.finish(f"train.steps={STEPS + 2}")
    assert run.curve()[:STEPS] == uninterrupted.curve()
    assert run.logged_steps() == list(range(1, STEPS + 3))
    assert "can only be raised" in run.finish("train.steps=3", code=2)
    assert "model.d_model: 128 -> 64" in run.finish("model.d_model=64", code=2)


def contents(directory: Path) -> dict[Path, bytes]:
    """Of the files of a run, but not of who holds it."""
    files = [path for path in directory.glob("*.*") if path.suffix != ".lock"]
    return {path: path.read_bytes() for path in files}


def test_other_data_is_refused_and_changes_nothing(
    shards: Path, tmp_path: Path, uninterrupted: Run
) -> None:
    from data_pipeline.shards import write_shards

    run = copy_of(uninterrupted, shards, tmp_path / "run")
    other = tmp_path / "other"
    write_shards([("a", "abc def " * 99)], shards / "tokenizer.json", other, extra={})
    before = contents(run.directory)
    assert "data.shards.0.shards" in run.finish(f"data.shards={other}", code=2)
    assert contents(run.directory) == before

    moved = tmp_path / "moved"
    shutil.copytree(shards, moved)
    run.finish(f"data.shards={moved}")


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    shards: Path, tmp_path: Path, uninterrupted: Run
) -> None:
    run = copy_of(uninterrupted, shards, tmp_path / "run")
    newest = max((run.directory / "checkpoints").iterdir())
    largest = max(newest.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    # A checkpoint that was being written when its run was killed.
    unfinished = newest.parent / f"step-{STEPS + 1:08d}"
    unfinished.mkdir()
    (unfinished / largest.name).write_bytes(b"half")
    output = run.finish("checkpoint.keep=1")
    assert output.count(f"step {STEPS} is damaged: {largest} has ") == 1
    assert f"{unfinished} was never finished" in output
    assert run.curve() == uninterrupted.curve()
    assert [path.name for path in newest.parent.iterdir()] == [newest.name]
    names = {path.name for path in newest.iterdir()}
    assert "manifest.json" in names
    assert not {largest.name, "set-aside-manifest.json"} & names


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(
    shards: Path, tmp_path: Path
) -> None:
    run = Run(shards, tmp_path / "run")
    output = run.finish("model.init_std=1e30", "--max-restarts", "3", code=1)
    assert "the loss is nan at step 1, and so it was for the 8 batches before" in output
    assert "restarting" not in output
    assert "Traceback" not in output
    assert not (run.directory / "done.json").exists()
    assert not list((run.directory / "checkpoints").glob("step-*"))
