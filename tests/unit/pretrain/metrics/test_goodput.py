import json
from pathlib import Path

import pytest

from pretrain.metrics import goodput
from pretrain.metrics.goodput import Goodput
from pretrain.metrics.sinks import JsonlSink
from pretrain.run_dir import RunDirectory


class Clock:
    """Stands in for time.time()."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(goodput.time, "time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "metrics.jsonl").touch()
    return RunDirectory(tmp_path)


def train(run: RunDirectory, clock: Clock, seen: Goodput, steps: range) -> dict:
    """Steps of 3 seconds, and 1 second lost after each."""
    rows = JsonlSink(run.metrics)
    for step in steps:
        clock.now += 3
        seen.add(3.0)
        clock.now += 1
        row = {"train/step": step, **seen.metrics()}
        rows.write(row)
    rows.close()
    return row


def test_what_is_no_step_is_lost(run: RunDirectory, clock: Clock) -> None:
    row = train(run, clock, Goodput(run), range(1, 5))
    assert row == {"train/step": 4, "perf/productive_s": 12.0, "perf/goodput": 12 / 16}


def test_an_attempt_goes_on_from_the_rows_that_are_left(
    run: RunDirectory, clock: Clock, tmp_path: Path
) -> None:
    train(run, clock, Goodput(run), range(1, 5))
    clock.now += 100
    folder = tmp_path / "aside"
    folder.mkdir()
    JsonlSink(run.metrics).cut_back(2, folder)
    row = train(run, clock, Goodput(run), range(3, 4))
    # Steps 3 and 4 of the first attempt were for nothing.
    assert row["perf/productive_s"] == 9.0
    assert row["perf/goodput"] == pytest.approx(9 / (16 + 100 + 4))


def test_steps_that_are_undone_no_longer_count(
    run: RunDirectory, clock: Clock, tmp_path: Path
) -> None:
    seen = Goodput(run)
    train(run, clock, seen, range(1, 5))
    folder = tmp_path / "aside"
    folder.mkdir()
    JsonlSink(run.metrics).cut_back(1, folder)
    seen.go_back()
    assert seen.metrics() == {"perf/productive_s": 3.0, "perf/goodput": 3 / 16}


def test_all_rows_undone_do_not_make_a_run_younger(
    run: RunDirectory, clock: Clock, tmp_path: Path
) -> None:
    train(run, clock, Goodput(run), range(1, 5))
    folder = tmp_path / "aside"
    folder.mkdir()
    JsonlSink(run.metrics).cut_back(0, folder)
    row = train(run, clock, Goodput(run), range(1, 2))
    assert row["perf/goodput"] == pytest.approx(3 / 20)
    assert json.loads(run.began.read_text()) == {"time": 1000.0}


def test_a_clock_that_was_set_back_gives_no_share_above_one(
    run: RunDirectory, clock: Clock
) -> None:
    seen = Goodput(run)
    seen.add(5.0)
    clock.now -= 50
    assert seen.metrics()["perf/goodput"] == 1.0
