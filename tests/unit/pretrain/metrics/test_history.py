import math

import numpy as np
import pytest

from pretrain.metrics.history import LEVELS_PER_UNIT, NO_DATA, read_history, smooth, thin
from pretrain.metrics.sinks import JsonlSink


def history_of(tmp_path, rows):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for row in rows:
        sink.write(row)
    sink.close()
    return read_history(tmp_path / "metrics.jsonl")


def test_run_without_metrics_has_an_empty_history(tmp_path):
    history = read_history(tmp_path / "metrics.jsonl")
    assert (history.rows, history.series, history.load) == (0, {}, None)
    assert history.last("train/loss") is None


def test_series_hold_only_the_steps_that_logged_them(tmp_path):
    rows = [{"train/step": step, "train/loss": 1 / step} for step in range(1, 7)]
    rows[1]["train/aux_loss"], rows[3]["train/loss"] = 9.0, math.nan
    history = history_of(tmp_path, rows)
    assert history.series["train/aux_loss"].step.tolist() == [2]
    assert history.series["train/loss"].value[5] == 1 / 6
    assert history.series["train/loss"].non_finite_steps() == [4]


@pytest.mark.parametrize(("count", "every"), [(1, 1), (7, 1), (399, 10), (401, 1), (1000, 5)])
def test_load_columns_average_the_steps_below_them(tmp_path, count, every):
    steps = every * np.arange(1, count + 1)
    loads = np.random.default_rng(0).dirichlet(np.ones(4), size=(count, 3))
    rows = [
        {"train/step": int(step), "moe/load": load.tolist()}
        for step, load in zip(steps, loads, strict=True)
    ]
    load = history_of(tmp_path, rows).load
    assert load.level.shape == (3, 4, min(count, 400))
    edges = np.linspace(load.first_step, load.last_step, load.level.shape[-1] + 1)
    for column in range(0, load.level.shape[-1], 13):
        inside = (steps >= edges[column]) & (steps < edges[column + 1])
        expected = loads[inside].mean(0) * 4 * LEVELS_PER_UNIT
        assert np.abs(load.level[..., column] - expected.clip(max=NO_DATA - 1)).max() <= 0.5


def test_steps_without_loads_are_marked_and_many_experts_take_fewer_columns(tmp_path):
    even = np.full((16, 512), 1 / 512).tolist()
    rows = [{"train/step": step, "moe/load": even} for step in [*range(1, 100), *range(200, 250)]]
    level = history_of(tmp_path, rows).load.level
    assert level.size <= 1_000_000
    assert set(np.unique(level)) == {LEVELS_PER_UNIT, NO_DATA}


def test_smoothing_has_no_bias_at_the_start_and_passes_over_gaps():
    assert smooth(np.full(50, 3.0), 10) == pytest.approx(np.full(50, 3.0))
    smoothed = smooth(np.array([1.0, np.nan, np.inf, 1.0, 4.0]), 3)
    assert np.isnan(smoothed).tolist() == [False, True, True, False, False]
    assert smoothed[3] == pytest.approx(1.0)
    assert 1.0 < smoothed[4] < 4.0


def test_thinning_keeps_spikes_gaps_and_the_limit():
    value = np.sin(np.arange(100_000) / 500)
    value[[123, 45_678]] = 99.0, -99.0
    value[70_000] = np.nan
    kept = thin(value, 3000)
    assert {123, 45_678, 70_000} <= set(kept.tolist())
    assert len(kept) <= 3001
    assert np.all(np.diff(kept) > 0)
    assert thin(value[:3000], 3000).tolist() == list(range(3000))
