"""What the panel makes of rows, and where it is shown."""

import io
import json
import math
import os
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.panel import Panel, sparkline
from launch.screen import EVENT_LINE, STEP_LINE, takes_a_panel
from pretrain.config import load_config
from pretrain.metrics.sinks import JsonlSink, step_line
from pretrain.run_dir import RunDirectory

WIDTH, HEIGHT = 80, 24


class Time:
    """A clock that goes when it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wall(self) -> datetime:
        return datetime.fromtimestamp(1_800_000_000 + self.now)


@pytest.fixture
def time() -> Time:
    return Time()


def make_run(root: Path, *settings: str) -> RunDirectory:
    run = RunDirectory(root)
    root.mkdir()
    run.config.write_text(load_config("tiny", ["train.steps=100", *settings]).to_yaml())
    return run


def row_of(step: int, tokens: int, loss: float = 5.0, **more: Any) -> dict[str, Any]:
    return {
        "train/step": step,
        "train/tokens": tokens,
        "train/loss": loss,
        "train/lr": 1e-3,
        "train/grad_norm": 0.5,
        "perf/tokens_per_s": 1000.0,
        **more,
    }


def shown(panel: Panel, width: int = WIDTH, height: int = HEIGHT) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=width, height=height, force_terminal=True, no_color=True)
    console.print(panel.render(width, height))
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).splitlines()


def test_a_sparkline_is_between_the_least_and_the_largest_and_marks_what_is_not_finite() -> None:
    assert sparkline([3.0, 1.0, 2.0], 10) == "█▁▅"
    assert sparkline([4.0, 4.0, 0.0, 0.0], 2) == "█▁"
    assert sparkline([2.0, math.nan, 1.0, 1.0, math.inf, 1.5], 6) == "█×▁▁×▅"
    assert sparkline([2.0, math.nan, 1.0, 1.0], 2) == "×▁"
    assert sparkline([7.0, 7.0], 9) == "▁▁"
    assert sparkline([], 9) == sparkline([math.nan], 0) == ""


def test_an_end_that_no_calendar_knows_is_no_eta(tmp_path: Path, time: Time) -> None:
    run = make_run(tmp_path / "run", "train.steps=1000000000000")
    panel = Panel(run, time, time.wall)
    panel.begin(1)
    sink = JsonlSink(run.metrics)
    sink.write(row_of(1, 10, **{"perf/tokens_per_s": 1e-3}))
    sink.close()
    panel.look()
    assert any(re.search(r"ETA +-", line) for line in shown(panel))


def test_the_panel_shows_the_newest_row_and_fits_its_terminal(tmp_path: Path, time: Time) -> None:
    run = make_run(tmp_path / "run")
    panel = Panel(run, time, time.wall)
    panel.begin(1)
    text = "\n".join(shown(panel))
    assert "run, attempt 1, starting, 0 s" in text
    assert "0 of 100" in text
    assert "nothing is logged yet" in text
    rows = JsonlSink(run.metrics)
    more: Mapping[str, Any] = {"perf/mfu": 0.412, "guard/skipped": 2, "guard/rollbacks": 1}
    for step in range(1, 26):
        loss = math.nan if step == 7 else 5 - step / 10
        rows.write(row_of(step, step * 4096, loss, **more))
    assert panel.look()
    assert not panel.look()
    panel.note("warning: step 7: the loss is not finite; batch skipped")
    lines = shown(panel)
    text = "\n".join(lines)
    assert re.search(r"step +25 of 100 ━+─+ 25 %", text)
    assert re.search(r"loss +2\.5000 █\S*×\S*▁", text)
    assert re.search(r"tokens/s +1,000 +MFU +41\.2%", text)
    assert re.search(r"lr +1\.00e-03 +grad norm +0\.500", text)
    assert "saved     no checkpoint yet" in text
    assert "batches skipped: 2, rollbacks: 1" in text
    assert "warning: step 7: the loss is not finite; batch skipped" in text
    for width, height in ((80, 24), (40, 24), (40, 12), (200, 50), (20, 24), (14, 5)):
        lines = shown(panel, width, height)
        assert max(map(len, lines)) <= width - 3
        assert len(lines) < max(height, 12)
        for name in ("step", "loss", "tokens/s", "MFU", "lr", "grad norm", "ETA", "saved"):
            assert any(name in line for line in lines)


def test_a_loss_that_is_not_finite_is_shown_as_such(tmp_path: Path, time: Time) -> None:
    run = make_run(tmp_path / "run")
    JsonlSink(run.metrics).write(row_of(3, 9, math.nan, **{"train/grad_norm": math.inf}))
    text = "\n".join(shown(Panel(run, time, time.wall)))
    assert re.search("loss +nan ×", text)
    assert re.search("grad norm +inf", text)


def test_what_is_left_of_phases_of_other_lengths_goes_by_tokens(tmp_path: Path, time: Time) -> None:
    """50 steps of 8 x 512 tokens, then 50 of 8 x 2,048."""
    run = make_run(
        tmp_path / "run",
        "data.seq_len=512",
        "train.global_batch=8",
        "phases=[{from_step: 50, data.seq_len: 2048}]",
    )
    panel = Panel(run, time, time.wall)
    panel.begin(1)
    rows = JsonlSink(run.metrics)
    assert panel.remaining_s() is None
    for step in range(1, 11):
        rows.write(row_of(step, step * 4096))
        # Compiled and set up, in a minute; then a step every two seconds.
        time.now = 60 + 2 * step
        panel.look()
    per_token_s = 2 / 4096
    expected = (40 * 4096 + 50 * 16384) * per_token_s
    assert panel.remaining_s() == pytest.approx(expected)
    time.now += 1.5
    assert panel.remaining_s() == pytest.approx(expected - 1.5)
    panel.end()
    assert panel.remaining_s() is None


def test_rows_of_steps_that_were_undone_are_forgotten(tmp_path: Path, time: Time) -> None:
    run = make_run(tmp_path / "run")
    rows = JsonlSink(run.metrics)
    panel = Panel(run, time, time.wall)
    for step in range(1, 9):
        rows.write(row_of(step, step * 4096, 9.0 if step > 4 else 5.0))
        time.now += 10
        panel.look()
    assert "8 of 100" in "\n".join(shown(panel))
    rows.cut_back(4, tmp_path)
    panel.look()
    text = "\n".join(shown(panel))
    assert "4 of 100" in text
    assert re.search("loss +5.0000 ▁▁▁▁ *$", text, re.MULTILINE)
    rows.cut_back(0, tmp_path)
    panel.look()
    assert "0 of 100" in "\n".join(shown(panel))
    rows.write(row_of(1, 4096))
    panel.look()
    # As a kill leaves it.
    with run.metrics.open("a") as file:
        file.write('{"train/step": 5, "train/lo')
    assert not panel.look()
    assert "1 of 100" in "\n".join(shown(panel))


def test_checkpoints_are_told_once(tmp_path: Path, time: Time) -> None:
    run = make_run(tmp_path / "run")
    run.saved.write_text(json.dumps({"step": 10}))
    os.utime(run.saved, (time.wall().timestamp(), time.wall().timestamp()))
    panel = Panel(run, time, time.wall)
    time.now = 65
    assert "step 10, 1 min ago" in "\n".join(shown(panel))
    assert "checkpoint of" not in "\n".join(shown(panel))
    run.saved.write_text(json.dumps({"step": 20}))
    for _ in range(2):
        panel.look()
    assert "\n".join(shown(panel)).count("checkpoint of step 20") == 1


def test_lines_of_steps_are_told_from_those_that_stay() -> None:
    assert STEP_LINE.match(step_line(row_of(3, 9, math.nan), 1000))
    assert not STEP_LINE.match("step 3: loss 5.0 is a spike")
    assert EVENT_LINE.match("warning: step 3: a spike; batch skipped")
    assert not EVENT_LINE.match("kernels: attention flash")


@pytest.mark.parametrize(
    ("environment", "encoding", "expected"),
    [
        ({"TERM": "xterm"}, "utf-8", True),
        ({"TERM": "dumb"}, "utf-8", False),
        ({}, "utf-8", False),
        ({"TERM": "xterm", "CI": "true"}, "utf-8", False),
        ({"TERM": "xterm"}, "latin-1", False),
    ],
)
def test_a_panel_is_for_a_terminal_that_somebody_looks_at(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], encoding: str, expected: bool
) -> None:
    for name in ("TERM", "CI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    master, terminal = os.openpty()
    with open(master), open(terminal, "w", encoding=encoding) as file:
        assert takes_a_panel(file) is expected
    assert not takes_a_panel(io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
