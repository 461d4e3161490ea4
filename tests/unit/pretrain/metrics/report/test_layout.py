"""What the charts of a page are, and what they are drawn from."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from pretrain.metrics import report
from pretrain.metrics.history import LEVELS_PER_UNIT, NO_DATA
from pretrain.metrics.registry import METRICS
from pretrain.metrics.report import chart_columns
from pretrain.metrics.report.layout import COLORS, DRAWN, lay_out
from tests.unit.pretrain.metrics.report.report_cases import make_run

# What another chart says as well, and what is told otherwise.
NOT_CHARTED = {"train/step", "train/loss_tokens_by_position"}


def charts_of(*runs):
    return {chart.name: chart for section in lay_out(runs) for chart in section.charts}


def test_every_metric_that_training_logs_has_a_chart():
    told_elsewhere = {"data", "eval"}
    logged = {name for name in METRICS if name.partition("/")[0] not in told_elsewhere}
    assert logged - DRAWN == NOT_CHARTED
    assert set(METRICS) >= DRAWN


def test_metrics_that_were_not_logged_have_no_chart(tmp_path):
    run = make_run(tmp_path / "run", [{"train/step": 1, "train/loss": 2.0, "perf/mfu": 0.4}])
    assert set(charts_of(run)) == {"train/loss", "perf/mfu"}
    assert {name.partition("|")[0] for name in chart_columns([run])} == {"train/loss", "perf/mfu"}


def test_metrics_of_another_version_are_drawn_under_their_names(tmp_path):
    old = make_run(tmp_path / "old", [{"train/step": 1, "train/warmth": 2.0, "odd/map": {"a": 1}}])
    new = make_run(tmp_path / "new", [{"train/step": 1, "train/loss": 2.0}])
    *_, other, _ = lay_out([old, new])
    assert [chart.title for chart in other.charts] == ["train/warmth", "odd/map/a"]


def test_runs_share_a_chart_and_have_one_colour_everywhere(tmp_path):
    rows = [
        {"train/step": step, "train/loss": 3.0 / step, "perf/mfu": 0.4, "perf/hfu": 0.5}
        for step in (1, 2)
    ]
    charts = charts_of(make_run(tmp_path / "a", rows), make_run(tmp_path / "b", rows))
    assert [line.label for line in charts["train/loss"].lines] == ["a", "b"]
    first, second = (line.color for line in charts["train/loss"].lines)
    assert first != second
    by_label = {line.label: line for line in charts["perf/mfu"].lines}
    assert len(by_label) == 4
    assert {line.color for name, line in by_label.items() if name.startswith("b ")} == {second}
    assert by_label["a · model (MFU)"].dash != by_label["a · hardware (HFU)"].dash


def test_parts_of_a_metric_are_lines_of_one_chart(tmp_path):
    sent = {"dp/fsdp": {"all_gather": 30}, "ep": {"all_to_all": 10}}
    run = make_run(tmp_path / "run", [{"train/step": 1, "perf/sent_bytes_by_axis": sent}])
    lines = charts_of(run)["perf/sent_bytes_by_axis"].lines
    assert [line.label for line in lines] == ["dp/fsdp/all_gather", "ep/all_to_all"]
    assert len({line.color for line in lines}) == 2


def test_values_that_are_not_finite_are_gaps_and_marked(tmp_path):
    losses = [4.0, math.nan, math.inf, 2.0]
    rows = [{"train/step": step, "train/loss": loss} for step, loss in enumerate(losses, 1)]
    columns = chart_columns([make_run(tmp_path / "run", rows)])
    np.testing.assert_array_equal(columns["train/loss|run"]["value"], [4, np.nan, np.nan, 2])
    gaps = columns["train/loss|run:gaps"]
    assert gaps["step"].tolist() == [2, 3]
    assert gaps["value"].tolist() == [4, 4]


def test_a_long_run_is_smoothed_from_means_not_from_extremes(tmp_path):
    rows = [{"train/step": step, "train/loss": float(step % 100 == 0)} for step in range(1, 20_001)]
    columns = chart_columns([make_run(tmp_path / "run", rows)])
    drawn, means = columns["train/loss|run"]["value"], columns["train/loss|run:mean"]["value"]
    assert drawn.size <= 4000
    assert drawn.max() == 1
    assert means.mean() == pytest.approx(0.01, rel=0.05)


def test_maps_by_layer_have_a_logarithmic_scale_that_a_spike_does_not_take(tmp_path):
    rows = [
        {"train/step": step, "train/grad_norm_by_layer": [1.0, 10.0, 0.1]} for step in range(1, 201)
    ]
    rows[77]["train/grad_norm_by_layer"] = [1e9, math.nan, 0.0]
    columns = chart_columns([make_run(tmp_path / "run", rows)])["train/grad_norm_by_layer|run"]
    image = columns["image"][0]
    assert (columns["low"][0], columns["high"][0]) == pytest.approx((0.1, 10), rel=0.01)
    assert image[:, 0].tolist() == [127, NO_DATA - 1, 0]
    assert image[:, 77].tolist() == [NO_DATA - 1, NO_DATA, 0]


@pytest.mark.parametrize(("layers", "charts"), [(2, 2), (12, 2)])
def test_many_layers_of_experts_have_an_overview_and_one_chart(tmp_path, layers, charts):
    load = np.full((layers, 4), 0.25)
    load[-1] = [0.5, 0.5, 0, 0]
    rows = [{"train/step": step, "moe/load": load.tolist()} for step in (1, 2, 3)]
    run = make_run(tmp_path / "run", rows)
    drawn = [chart for name, chart in charts_of(run).items() if name.startswith("moe/load")]
    assert len(drawn) == charts
    columns = chart_columns([run])
    last = columns[f"moe/load:{layers}|run"]["image"][0]
    assert last[:, 0].tolist() == [2 * LEVELS_PER_UNIT] * 2 + [0] * 2
    if layers == 12:
        busiest = columns["moe/load:busiest|run"]["image"][0]
        assert busiest[:, 1].tolist() == [LEVELS_PER_UNIT] * 11 + [2 * LEVELS_PER_UNIT]
        assert len(drawn[1].maps) == 12


def luminance(color: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(first: str, second: str) -> float:
    light, dark = sorted([luminance(first), luminance(second)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_and_lines_stand_out_in_both_schemes():
    style = (Path(report.__file__).parent / "page.css.jinja").read_text()
    dark, light = (
        dict(re.findall(r"--(\w+(?:-\w+)*): (#\w{6});", block))
        for block in re.findall(r"color-scheme: \w+;(.*?)(?:}|{%)", style, re.DOTALL)
    )
    for scheme in (light, dark):
        for text in ("ink", "muted", "alarm"):
            assert contrast(scheme[text], scheme["paper"]) >= 4.5
        assert contrast(scheme["alarm"], scheme["alarm-wash"]) >= 4.5
        assert min(contrast(color, scheme["paper"]) for color in COLORS) >= 3
