"""The report's heat maps of the newest evaluation on long contexts."""

import json
import math
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from pretrain.evals.request import DEPTHS
from pretrain.metrics.evaluation import GridRow, read_evaluation
from pretrain.metrics.history import read_history
from pretrain.metrics.report import Run, render_page
from pretrain.metrics.report.curves import by_position
from pretrain.run_dir import RunDirectory

LENGTHS = [1024, 65536]


def save(run: RunDirectory, step: int, **fields: Any) -> None:
    cells = [
        {"task": "needle", "depth": depth, "length": length, "questions": 8, "right": number}
        for length in LENGTHS
        for number, depth in enumerate(DEPTHS)
    ]
    cells += [
        {"task": "overwrite", "depth": None, "length": length, "questions": 40, "right": 30}
        for length in LENGTHS
    ]
    tree = {
        "step": step,
        "form": "tokens",
        "chance": 0.02,
        "request": {"lengths": LENGTHS, "tasks": ["needle", "overwrite"], "samples": 8},
        "cells": cells,
        "loss_by_position": [{"first": 4096, "last": 8191, "loss": 2.25, "tokens": 1234}],
    }
    path = run.evaluation("long", step)
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(tree | fields))


def page_of(run: RunDirectory) -> str:
    return render_page([Run("run", run, read_history(run.metrics))])


def test_rows_are_tasks_or_depths_and_columns_lengths(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert read_evaluation(run) is None
    save(run, 900)
    save(run, 1000)
    found = read_evaluation(run)
    assert found is not None
    assert (found.step, found.lengths) == (1000, LENGTHS)
    by_task, by_depth = found.grids
    assert [(row.label, row.shares) for row in by_task.rows] == [
        ("needle", (0.25, 0.25)),
        ("overwrite", (0.75, 0.75)),
    ]
    assert [(row.label, row.shares[0]) for row in by_depth.rows] == [
        ("0%", 0.0),
        ("25%", 0.125),
        ("50%", 0.25),
        ("75%", 0.375),
        ("100%", 0.5),
    ]


def test_the_page_shows_them_even_before_the_first_metric(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    save(run, 1000)
    page = page_of(run)
    cells = re.findall(r'<td style="--share: ([\d.]+)">([\d.]+)%', page)
    assert len(cells) == 2 * (2 + len(DEPTHS))
    assert all(float(share) == float(percent) / 100 for share, percent in cells)
    text = " ".join(unescape(re.sub(r"<[^>]+>", " ", page)).split())
    assert "Needle at depth 1,024 65,536 0% 0.0% 0.0% 25% 12.5% 12.5%" in text
    assert "4,096 to 8,191 2.2500 1,234" in text


def test_a_run_that_has_diverged_leaves_the_curves_of_others(tmp_path: Path) -> None:
    runs = [RunDirectory(tmp_path / name) for name in ("diverged", "good")]
    for run, losses in zip(runs, ([math.nan, 1.0], [3.0, 2.0]), strict=True):
        buckets = [
            {"first": first, "last": 2 * first - 1, "loss": loss, "tokens": 10}
            for first, loss in zip((1024, 2048), losses, strict=True)
        ]
        save(run, 1000, loss_by_position=buckets)
    chart = by_position([(run.root.name, read_evaluation(run)) for run in runs])
    assert [curve.values for curve in chart.curves] == [[None, 1.0], [3.0, 2.0]]
    assert (chart.low, chart.high) == pytest.approx((0.9, 3.1))

    save(runs[0], 1000, loss_by_position=[{"first": 1, "last": 1, "loss": math.inf, "tokens": 1}])
    assert by_position([("diverged", read_evaluation(runs[0]))]) is None


def test_loss_by_position_alone(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    request = {"lengths": LENGTHS, "tasks": [], "samples": 8}
    save(run, 5, cells=[], request=request)
    found = read_evaluation(run)
    assert found is not None
    assert not found.grids
    assert "4,096 to 8,191" in page_of(run)


def test_a_task_of_another_version_is_shown_without_its_help(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    cell = {"task": "of_tomorrow", "depth": None, "length": 1024, "questions": 4, "right": 1}
    request = {"lengths": [1024], "tasks": ["of_tomorrow"], "samples": 4}
    save(run, 9, cells=[cell], request=request)
    found = read_evaluation(run)
    assert found is not None
    assert found.grids[0].rows == (GridRow("of_tomorrow", "", (0.25,)),)
