import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain import attempt
from pretrain.metrics import goodput
from pretrain.metrics.goodput import CAUSES, Goodput
from pretrain.metrics.registry import check_names
from pretrain.metrics.sinks import JsonlSink
from pretrain.run_dir import RunDirectory

START_S = 20.0


class Clock:
    """Stands in for the clock of the wall, and for the one that is never set back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.ahead = 1000.0, 0.0
        monkeypatch.setattr(goodput.time, "time", lambda: self.now + self.ahead)
        monkeypatch.setattr(goodput.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Run:
    """A run whose steps take 3.1 s, of which 0.1 s for the batch, and rows 0.3 s."""

    def __init__(self, root: Path, clock: Clock) -> None:
        self.directory, self.clock = RunDirectory(root), clock

    def start(self, from_step: int, *, is_requeued: bool = False) -> None:
        """An attempt that goes on from a checkpoint."""
        number = self.directory.begin_attempt()
        started = self.clock.now + self.clock.ahead
        self.clock.now += START_S
        self.account = Goodput(self.directory, number, started, is_requeued=is_requeued)
        self.rows = JsonlSink(self.directory.metrics)
        self.rows.cut_back(from_step, self.directory.aside(number))
        self.account.undo()
        self.account.save()

    def train(self, steps: range) -> dict[str, Any]:
        for step in steps:
            self.clock.now += 3.1
            self.account.add_step(0.1, is_taken=True)
            self.clock.now += 0.3
            self.account.spend("logging")
            row = {"train/step": step, **self.account.metrics()}
            self.rows.write(row)
        return row

    def checkpoint(self) -> None:
        self.clock.now += 5
        self.account.spend("checkpoints")
        self.account.save()

    def stop(self) -> None:
        self.checkpoint()
        self.account.save(is_stopped=True)

    def age_s(self) -> float:
        return self.clock.now + self.clock.ahead - 1000.0


@pytest.fixture
def run(tmp_path: Path, clock: Clock) -> Run:
    return Run(tmp_path, clock)


def lost(row: dict[str, Any]) -> dict[str, float]:
    """Without what is nothing."""
    causes: dict[str, float] = row["perf/lost_s"]
    assert tuple(causes) == CAUSES
    return {cause: pytest.approx(seconds) for cause, seconds in causes.items() if seconds}


def assert_complete(row: dict[str, Any], age_s: float) -> None:
    check_names(row)
    elapsed_s = math.fsum([row["perf/productive_s"], *row["perf/lost_s"].values()])
    assert elapsed_s == pytest.approx(age_s, rel=1e-12)
    assert row["perf/goodput"] == pytest.approx(row["perf/productive_s"] / age_s)


def test_what_is_not_computed_in_a_step_is_lost(run: Run) -> None:
    run.start(0)
    row = run.train(range(1, 5))
    assert row["perf/productive_s"] == pytest.approx(12)
    assert lost(row) == {"starting": START_S, "data wait": 0.4, "logging": 1.2}
    assert row["perf/ettr"] == row["perf/goodput"]
    assert_complete(row, run.age_s())


def test_an_attempt_that_was_killed_has_lost_what_it_had_not_saved(run: Run) -> None:
    run.start(0)
    run.train(range(1, 3))
    run.checkpoint()
    run.train(range(3, 5))
    run.clock.now += 100
    run.start(2)
    row = run.train(range(3, 4))
    assert row["perf/productive_s"] == pytest.approx(9)
    assert lost(row) == {
        "starting": 2 * START_S,
        "data wait": 0.5,
        "undone steps": 6,
        "checkpoints": 5,
        "logging": 1.5,
        "between attempts": 100,
    }
    assert_complete(row, run.age_s())


def test_steps_that_a_rollback_undoes_are_lost_with_the_time_it_takes(run: Run) -> None:
    run.start(0)
    run.train(range(1, 5))
    run.clock.now += 3.1
    run.account.add_step(0.1, is_taken=False)
    run.rows.cut_back(1, run.directory.aside(1))
    run.clock.now += 2
    run.account.undo()
    run.account.spend("undone steps")
    run.account.save()
    # An attempt that is killed right after knows of it.
    run.clock.now += 50
    run.start(1)
    row = run.train(range(2, 3))
    assert row["perf/productive_s"] == pytest.approx(6)
    assert lost(row) == {
        "starting": 2 * START_S,
        "data wait": 0.6,
        "skipped batches": 3,
        "undone steps": 9 + 2,
        "logging": 1.5,
        "between attempts": 50,
    }
    assert_complete(row, run.age_s())


@pytest.mark.parametrize(("is_requeued", "cause"), [(False, "stopped"), (True, "between attempts")])
def test_what_nobody_waited_for_counts_as_stopped(run: Run, is_requeued: bool, cause: str) -> None:
    run.start(0)
    run.train(range(1, 3))
    run.stop()
    run.clock.now += 1000
    run.start(2, is_requeued=is_requeued)
    row = run.train(range(3, 4))
    assert lost(row)[cause] == 1000
    assert_complete(row, run.age_s())
    wanted_s = run.age_s() - (0 if is_requeued else 1000)
    assert row["perf/ettr"] == pytest.approx(9 / wanted_s)


def test_all_rows_undone_do_not_make_a_run_younger(run: Run) -> None:
    run.start(0)
    run.train(range(1, 5))
    run.start(0)
    row = run.train(range(1, 2))
    assert lost(row)["undone steps"] == 12
    assert_complete(row, run.age_s())
    assert json.loads(run.directory.began.read_text()) == {"time": 1000.0}


def test_a_clock_that_was_set_back_undoes_nothing(run: Run) -> None:
    run.start(0)
    run.train(range(1, 5))
    run.checkpoint()
    known_s = run.age_s()
    run.clock.ahead -= 500
    run.start(4)
    row = run.train(range(5, 6))
    assert all(seconds >= 0 for seconds in row["perf/lost_s"].values())
    assert_complete(row, known_s + 3.4)


def test_a_process_knows_when_it_was_started() -> None:
    reader, writer = os.pipe()
    tick_s, before = 0.02, time.time()
    if (child := os.fork()) == 0:
        os.write(writer, str(attempt.process_started()).encode())
        os._exit(0)
    after = time.time()
    os.waitpid(child, 0)
    assert before - tick_s <= float(os.read(reader, 99)) <= after + tick_s
