import json
import math
import os
from functools import partial
from pathlib import Path

import pytest

from pretrain.errors import FencedError, UserError
from pretrain.metrics.sinks import JsonlSink, MetricsWriter, last_row, last_step, read_metrics
from pretrain.run_dir import RunDirectory, WriteError
from tests.disks import files_of_at_most


@pytest.fixture
def aside(tmp_path: Path) -> Path:
    folder = tmp_path / "aside"
    folder.mkdir()
    return folder


def write_steps(path: Path, steps: range) -> None:
    sink = JsonlSink(path)
    for step in steps:
        sink.write({"train/step": step, "train/loss": 1 / step})
    sink.close()


def steps_in(path: Path) -> list[int]:
    return [row["train/step"] for row in read_metrics(path)]


def refuse_constant(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def test_rows_come_back_in_full_precision_before_the_file_is_closed(tmp_path):
    row = {"train/step": 1, "train/loss": 0.1 + 0.2, "moe/load": [[0.25, 0.75], [1 / 3, 2 / 3]]}
    JsonlSink(tmp_path / "metrics.jsonl").write(row)
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == [row]


def test_numbers_that_are_not_finite_stay_json_and_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonlSink(path).write(
        {
            "train/step": 1,
            "train/loss": math.nan,
            "train/grad_norm": math.inf,
            "moe/load": [[-math.inf]],
        }
    )
    json.loads(path.read_text(), parse_constant=refuse_constant)
    (row,) = read_metrics(path)
    assert math.isnan(row["train/loss"])
    assert row["train/grad_norm"] == math.inf
    assert row["moe/load"] == [[-math.inf]]


@pytest.mark.parametrize("length", [10, 70_000, 200_000])
def test_the_last_row_is_found_from_the_end(tmp_path, length):
    path = tmp_path / "metrics.jsonl"
    path.touch()
    assert last_row(path) == {}
    rows = JsonlSink(path)
    for step in (1, 2, 3):
        rows.write({"train/step": step, "train/loss": math.inf, "moe/load": "x" * length})
        assert last_row(path) == [*read_metrics(path)][-1]
    with path.open("a") as file:
        file.write('{"train/step": 4')
    assert last_row(path)["train/step"] == last_step(path) == 3
    rows.close()


def test_cut_back_keeps_each_step_once(tmp_path, aside):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 8))
    before = path.read_text().splitlines()[:4]
    resumed = JsonlSink(path)
    resumed.cut_back(4, aside)
    resumed.write({"train/step": 5})
    resumed.close()
    assert path.read_text().splitlines()[:4] == before
    assert steps_in(path) == [1, 2, 3, 4, 5]
    assert os.listdir(aside) == []


def test_a_row_is_replaced_or_kept_but_never_lost(tmp_path, aside, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4))
    sink, row = JsonlSink(path), {"train/step": 3, "train/loss": math.inf}
    with monkeypatch.context() as killed:
        killed.setattr(Path, "rename", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            sink.cut_back(2, aside, [row])
    assert steps_in(path) == [1, 2, 3]
    sink.cut_back(2, aside, [row])
    assert [*read_metrics(path)][2:] == [row]
    sink.write({"train/step": 4})
    assert steps_in(path) == [1, 2, 3, 4]


def test_half_written_last_line_is_left_out_and_cut(tmp_path, aside):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4))
    whole = path.read_bytes()
    for length in range(len(whole) - 20, len(whole)):
        path.write_bytes(whole[:length])
        assert steps_in(path) == [1, 2]
        sink = JsonlSink(path)
        sink.cut_back(10, aside)
        sink.write({"train/step": 3})
        sink.close()
        assert steps_in(path) == [1, 2, 3]


def test_earlier_attempt_still_running_does_not_write_into_the_resumed_run(tmp_path, aside):
    path = tmp_path / "metrics.jsonl"
    earlier = JsonlSink(path)
    earlier.write({"train/step": 1})
    resumed = JsonlSink(path)
    resumed.cut_back(1, aside)
    earlier.write({"train/step": 2, "train/loss": 9.0})
    resumed.write({"train/step": 2, "train/loss": 1.0})
    assert [row.get("train/loss") for row in read_metrics(path)] == [None, 1.0]


@pytest.mark.parametrize("room", [0, 1, 40])
def test_a_full_disk_leaves_whole_rows_and_is_named(tmp_path, room):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4))
    before, sink = path.read_bytes(), JsonlSink(path)
    row = {"train/step": 4, "train/loss": 1 / 3, "train/grad_norm": 1 / 7}
    told = rf"{path} cannot be written: File too large\..*with room left.* the same command goes on"
    with files_of_at_most(len(before) + room), pytest.raises(WriteError, match=told):
        sink.write(row)
    assert path.read_bytes() == before
    sink.write(row)
    sink.close()
    assert steps_in(path) == [1, 2, 3, 4]


def test_cut_back_looks_only_at_what_it_drops(tmp_path, aside, monkeypatch):
    """A row of many experts has half a megabyte, and a file as many rows as the run has steps."""
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for step in range(1, 101):
        sink.write({"train/step": step, "train/loss": [0.5] * 3000})
    kept = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:98]
    looked_at = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda line: looked_at.append(line) or loads(line))
    sink.cut_back(98, aside)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(kept)
    assert len(looked_at) == 3


def test_cut_back_on_a_full_disk_leaves_the_rows_and_takes_no_room(tmp_path, aside):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 8))
    sink = JsonlSink(path)
    before = path.read_bytes()
    told = f"{aside / path.name} cannot be written: File too large"
    with files_of_at_most(len(before) // 2), pytest.raises(WriteError, match=told):
        sink.cut_back(6, aside)
    assert path.read_bytes() == before
    assert os.listdir(aside) == []
    sink.cut_back(4, aside)
    sink.write({"train/step": 5})
    assert steps_in(path) == [1, 2, 3, 4, 5]


def test_attempt_that_is_fenced_off_writes_no_row(tmp_path):
    run = RunDirectory(tmp_path)
    first = run.begin_attempt()
    writer = MetricsWriter([JsonlSink(run.metrics)], partial(run.check_attempt, first))
    writer.log({"train/step": 1})
    late = JsonlSink(run.metrics)
    run.begin_attempt()
    with pytest.raises(FencedError):
        writer.log({"train/step": 2})
    with pytest.raises(FileNotFoundError):
        late.cut_back(0, run.aside(first))
    assert steps_in(run.metrics) == [1]


def test_damaged_line_names_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"train/step": 1}\n{"train/st\n{"train/step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: .*train/st.* is not JSON"):
        list(read_metrics(path))


def test_writer_refuses_unregistered_names_and_rows_without_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter([JsonlSink(path)])
    with pytest.raises(ValueError, match="not registered"):
        writer.log({"train/step": 1, "train/Loss": 2.0})
    with pytest.raises(ValueError, match="train/step"):
        writer.log({"train/loss": 2.0})
    writer.log({"train/step": 1})
    assert steps_in(path) == [1]
