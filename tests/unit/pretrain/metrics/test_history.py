import json
import math
import tracemalloc

import numpy as np
import pytest

from pretrain.metrics import history as history_module
from pretrain.metrics.downsample import MAX_BUCKETS, ColumnAverager, Downsampler
from pretrain.metrics.history import LEVELS_PER_UNIT, NO_DATA, HistoryReader, read_history
from pretrain.metrics.rows import FEW_BYTES, parse_rows
from pretrain.metrics.sinks import JsonlSink


def write_rows(path, rows):
    sink = JsonlSink(path)
    for row in rows:
        sink.write(row)
    sink.close()


@pytest.fixture
def metrics(tmp_path):
    return tmp_path / "metrics.jsonl"


def history_of(metrics, rows):
    write_rows(metrics, rows)
    return read_history(metrics)


def test_run_without_metrics_has_an_empty_history(metrics):
    history = read_history(metrics)
    assert (history.rows, history.series, history.load) == (0, {}, None)
    assert history.last("train/loss") is None


def test_series_hold_only_the_steps_that_logged_them(metrics):
    rows = [{"train/step": step, "train/loss": 1 / step} for step in range(1, 7)]
    rows[1]["train/aux_loss"], rows[3]["train/loss"] = 9.0, math.nan
    history = history_of(metrics, rows)
    assert history.series["train/aux_loss"].step.tolist() == [2]
    assert history.series["train/loss"].value[5] == 1 / 6
    assert history.series["train/loss"].non_finite_steps() == [4]


def test_numbers_within_mappings_and_lists_within_them(metrics):
    sent = {"dp": {"all_reduce": 5, "all_gather": 7}, "ep": {"all_to_all": 1}}
    rows = [{"train/step": 1, "bytes": sent, "by": {"a": [1.0, 2.0]}}, {"train/step": 2, "by": {}}]
    history = history_of(metrics, rows)
    parts = history.parts("bytes")
    assert {key: part.value.tolist() for key, part in parts.items()} == {
        "dp/all_reduce": [5],
        "dp/all_gather": [7],
        "ep/all_to_all": [1],
    }
    assert history.maps["by/a"].mean.tolist() == [[1.0], [2.0]]


def test_both_parsers_read_the_same():
    random = np.random.default_rng(0)
    rows = [
        {
            "train/step": step,
            "loss": random.random(),
            "whole": step % 3 if step % 2 else step / 7,
            "flag": step % 5 == 0,
            "nothing": None,
            "by": {"a": 1.5, "b": {"c": step}} if step % 4 else {},
            "list": random.random(3).tolist(),
            "ragged": list(range(1 + step % 3)),
            "with gaps": [1.0, None],
            "empty": [],
            "empty within": [[], []],
            "load": random.random((2, 2)).tolist(),
        }
        for step in range(1, 1001)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    assert len(lines) > FEW_BYTES
    fast = parse_rows(lines)
    # Text, too, has to be looked at line by line.
    each = parse_rows(lines + b'{"train/step": 0, "a": "text"}\n')
    assert (fast.rows, fast.lines, fast.damage) == (1000, 1000, None)
    assert (each.rows, each.lines, each.damage) == (1001, 1001, None)
    assert {column.name for column in fast.columns} == {
        *("train/step", "loss", "whole", "flag", "by/a", "by/b/c"),
        *("list", "ragged", "with gaps", "load"),
    }

    def ordered(columns):
        columns = [column for column in columns if column.name != "train/step"]
        return sorted(columns, key=lambda column: (column.name, column.value.shape))

    for one, other in zip(ordered(fast.columns), ordered(each.columns), strict=True):
        assert one.name == other.name
        assert np.array_equal(one.step, other.step)
        assert np.array_equal(one.value, other.value, equal_nan=True)


@pytest.mark.parametrize("few", [True, False])
def test_lines_that_are_no_rows_are_left_out_and_told(metrics, few):
    rows = [json.dumps({"train/step": step, "loss": 1.0}) for step in range(10 if few else 9000)]
    rows[3:3] = ['{"train/step": 3, "lo', '{"loss": 2.0}', "", "\0\0", '{"train/step": "NaN"}']
    metrics.write_text("\n".join(rows) + '\n{"train/step": 10')
    history = read_history(metrics)
    assert history.rows == len(rows) - 5
    assert (history.damage.lines, history.damage.first_line) == (5, 4)
    assert history.damage.first_text == '{"train/step": 3, "lo'


@pytest.mark.parametrize("name", ["train/tokens", "train/step"])
def test_integers_that_no_float_holds_are_read_alike_by_both_parsers(name):
    row = json.dumps({"train/step": 1, name: 2**53 + 1}).encode() + b"\n"
    one, many = parse_rows(row), parse_rows(row * FEW_BYTES)
    assert many.rows == one.rows * FEW_BYTES
    assert {column.name: column.value[0] for column in many.columns} == {
        column.name: column.value[0] for column in one.columns
    }


def test_a_line_without_an_end_does_not_fill_the_memory(metrics, monkeypatch):
    monkeypatch.setattr(history_module, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(history_module, "LONGEST_LINE", 4000)
    row = b'{"train/step": 1, "loss": 1.0}\n'
    metrics.write_bytes(row + b"x" * 20_000 + b"\n" + row + row)
    history = read_history(metrics)
    assert history.rows == 3
    assert history.damage.first_line == 2


@pytest.mark.parametrize("sizes", [[100_003], [1, 2, 3000, 97_000], [7] * 1000 + [5001, 5001]])
def test_long_series_keep_extremes_ends_and_gaps(sizes):
    random = np.random.default_rng(0)
    step = 10.0 * np.arange(1, sum(sizes) + 1)
    value = random.normal(size=len(step))
    value[[123, -2]] = 99.0, -99.0
    value[4000:4010] = np.nan
    value[6000] = math.inf
    downsampler = Downsampler()
    for block in np.split(np.arange(len(step)), np.cumsum(sizes)[:-1]):
        downsampler.add(step[block], value[block])
    series = downsampler.series()
    drawn = dict(zip(series.step.tolist(), series.value.tolist(), strict=True))
    assert drawn[step[123]] == 99.0
    assert drawn[step[-2]] == -99.0
    assert (drawn[step[0]], drawn[step[-1]]) == (value[0], value[-1])
    assert math.isnan(drawn[step[6000]])
    assert len(series.step) <= 2 * MAX_BUCKETS + 4
    assert (np.diff(series.step) > 0).all()
    logged = dict(zip(step.tolist(), value.tolist(), strict=True))
    assert all(math.isnan(v) or v == logged[s] for s, v in drawn.items())
    assert (series.rows, series.non_finite) == (len(step), 11)
    assert series.non_finite_steps() == step[4000:4010].astype(int).tolist()

    rows = 2 ** math.ceil(math.log2(len(step) / MAX_BUCKETS))
    for bucket in (0, 1, len(series.mean) - 1):
        inside = slice(bucket * rows, (bucket + 1) * rows)
        finite = np.isfinite(value[inside])
        assert series.mean[bucket] == pytest.approx(value[inside][finite].mean(), abs=1e-12)
        assert series.mean_step[bucket] == pytest.approx(step[inside][finite].mean())
        assert np.nanmin(value[inside]) in series.value
        assert np.nanmax(value[inside]) in series.value


def test_short_series_are_kept_as_they_are():
    value = np.random.default_rng(0).normal(size=2 * MAX_BUCKETS)
    value[[5, 6, 7, 900]] = np.nan
    value[100:200] = 1.0
    step = np.arange(len(value), dtype=float)
    downsampler = Downsampler()
    for i in range(0, len(value), 100):
        downsampler.add(step[i : i + 100], value[i : i + 100])
    series = downsampler.series()
    assert np.array_equal(series.step, step)
    assert np.array_equal(series.value, value, equal_nan=True)
    assert np.array_equal(series.mean, value, equal_nan=True)


@pytest.mark.parametrize(("count", "every"), [(1, 1), (7, 1), (399, 10), (513, 1), (1000, 5)])
def test_load_columns_average_the_steps_below_them(metrics, count, every):
    steps = every * np.arange(1, count + 1)
    loads = np.random.default_rng(0).dirichlet(np.ones(4), size=(count, 3))
    rows = [
        {"train/step": int(step), "moe/load": load.tolist()}
        for step, load in zip(steps, loads, strict=True)
    ]
    load = history_of(metrics, rows).load
    layers, experts, columns = load.level.shape
    assert (layers, experts) == (3, 4)
    assert min(count, 200) <= columns <= 512
    edges = np.linspace(load.first_step, load.last_step, columns + 1)
    assert edges[0] < steps[0]
    assert steps[-1] < edges[-1]
    for column in range(columns):
        inside = (steps >= edges[column]) & (steps < edges[column + 1])
        expected = loads[inside].mean(0) * 4 * LEVELS_PER_UNIT
        assert np.abs(load.level[..., column] - expected.clip(max=NO_DATA - 1)).max() <= 0.5001


def test_steps_without_loads_are_marked_and_many_experts_take_fewer_columns(metrics):
    even = np.full((16, 512), 1 / 512).tolist()
    rows = [{"train/step": step, "moe/load": even} for step in [*range(1, 100), *range(200, 250)]]
    level = history_of(metrics, rows).load.level
    assert level.size <= 1_000_000
    assert set(np.unique(level)) == {LEVELS_PER_UNIT, NO_DATA}


def test_lists_that_grow_and_numbers_that_are_not_finite_are_averaged_over_what_is_there():
    averager = ColumnAverager(1)
    averager.add(np.array([1.0, 2.0]), np.array([[1.0, math.nan], [3.0, math.inf]]))
    averager.add(np.array([3.0]), np.array([[5.0, 6.0, 7.0]]))
    drawn = averager.map()
    nan = math.nan
    expected = [[1, 3, 5], [nan, nan, 6], [nan, nan, 7]]
    assert np.array_equal(drawn.mean, expected, equal_nan=True)
    assert (drawn.first_step, drawn.last_step) == (0.5, 3.5)


def test_only_what_is_appended_is_read(metrics, monkeypatch):
    write_rows(metrics, [{"train/step": step, "loss": 1.0} for step in range(1, 100)])
    reader = HistoryReader(metrics)
    assert reader.read_all()
    assert not reader.read_all()
    parsed = []
    original = history_module.parse_rows
    monkeypatch.setattr(
        history_module,
        "parse_rows",
        lambda lines, first: parsed.append(lines) or original(lines, first),
    )
    with metrics.open("a") as file:
        file.write('{"train/step": 100, "loss"')
        file.flush()
        assert not reader.read_all()
        file.write(": 7.0}\n")
    assert reader.read_all()
    assert parsed == [b'{"train/step": 100, "loss": 7.0}\n']
    assert reader.history().last("loss") == 7.0
    assert reader.history().rows == 100


def test_a_file_that_is_cut_back_or_replaced_is_read_anew(metrics, tmp_path):
    rows = [{"train/step": step, "loss": float(step)} for step in range(1, 11)]
    write_rows(metrics, rows)
    reader = HistoryReader(metrics)
    reader.read_all()
    sink = JsonlSink(metrics)
    aside = tmp_path / "aside"
    aside.mkdir()
    sink.cut_back(4, aside)
    for step in range(5, 12):
        sink.write({"train/step": step, "loss": -float(step)})
    sink.close()
    assert reader.read_all()
    loss = reader.history().series["loss"]
    assert loss.value.tolist() == [1, 2, 3, 4, -5, -6, -7, -8, -9, -10, -11]

    # In place, and as long as before.
    metrics.write_text(metrics.read_text().replace("-", "8"))
    assert reader.read_all()
    assert reader.history().last("loss") == 811

    metrics.unlink()
    assert reader.read_all()
    assert reader.history().rows == 0
    assert not reader.read_all()


def test_memory_does_not_grow_with_the_file(metrics):
    def peak_of(rows):
        with metrics.open("w") as file:
            file.writelines(
                f'{{"train/step": {step}, "loss": {step % 97}.5, "by": [1.5, {step % 7}]}}\n'
                for step in range(rows)
            )
        tracemalloc.start()
        history = read_history(metrics)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert history.rows == rows
        return peak

    short, long = peak_of(200_000), peak_of(800_000)
    assert metrics.stat().st_size > 4 * history_module.BLOCK_BYTES
    assert long < 1.1 * short
