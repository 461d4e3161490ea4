"""Times of many processes and attempts add up; documents are counted by the audit alone."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.rates import METRICS, read_attempts, read_totals, save_metrics, timed


def write_attempt(folder: Path, name: str, *rows: dict[str, Any], rest: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    whole = [{f"data/{key}": value for key, value in row.items()} for row in rows]
    lines = "".join(json.dumps(row) + "\n" for row in whole)
    (folder / f"{name}.jsonl").write_text(lines + rest)


def row_of(part: str, time: float, wall_s: float, **more: Any) -> dict[str, Any]:
    fixed = {"stage": "clean", "part": part, "workers": 4, "finished": 1, "cpu_s": 2 * wall_s}
    return fixed | {"time": time, "wall_s": wall_s} | more


def test_parts_at_a_time_and_a_killed_attempt_add_up(tmp_path: Path) -> None:
    rates = tmp_path / "work" / "rates"
    # From 100 to 200 and from 150 to 250, and after a night from 1000 to 1050.
    first = row_of("1/2", 150, 50, documents=10, finished=0)
    write_attempt(rates, "a", first, row_of("1/2", 200, 100, documents=40))
    killed = row_of("2/2", 250, 100, documents=30, finished=0)
    write_attempt(rates, "b", killed, rest='{"data/stage": "cle')
    write_attempt(rates, "c", row_of("2/2", 1050, 50, documents=60))
    write_attempt(rates, "d", rest='{"data/st')
    volume = {"documents": 100, "bytes_in": 400_000_000, "bytes_out": 100_000_000}
    (total,) = save_metrics(tmp_path, {"clean": volume})
    assert total["data/attempts"] == 3
    assert total["data/wall_s"] == 200
    assert total["data/cpu_s"] == 500
    assert total["data/unfinished_s"] == 100
    assert total["data/documents"] == 100
    assert total["data/documents_per_s"] == 0.5
    assert total["data/documents_per_s_per_worker"] == 0.1
    assert total["data/mb_in_per_s"] == 2
    assert total["data/mb_out_per_s"] == 0.5
    rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [row["data/time"] for row in rows] == [150, 200, 250, 1050, 1050]
    assert read_totals(tmp_path) == [total]


def test_an_attempt_is_seen_while_it_works_and_after_it_failed(tmp_path: Path) -> None:
    def fail() -> None:
        with timed(tmp_path, "dedup", workers=2, part="1/1", measure=lambda: {"share": 0.25}):
            ((row, age_s),) = read_attempts(tmp_path)
            assert (row["data/stage"], row["data/share"], row["data/finished"]) == (
                "dedup",
                0.25,
                0,
            )
            assert age_s < 60
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    ((row, _),) = read_attempts(tmp_path)
    assert row["data/finished"] == 0
    with timed(tmp_path, "shards", workers=2) as attempt:
        attempt.count(documents=3)
    found = {row["data/stage"]: row for row, _ in read_attempts(tmp_path)}
    assert (found["shards"]["data/finished"], found["shards"]["data/documents"]) == (1, 3)


def test_no_beat_comes_behind_the_last_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def ticking(tick: Callable[[], None], every_s: float) -> Iterator[Callable[[], None]]:
        yield tick
        tick()

    monkeypatch.setattr("data_pipeline.rates.ticking", ticking)
    monkeypatch.setattr("data_pipeline.rates.BEAT_S", 0)
    monkeypatch.setattr("data_pipeline.rates.INTERVAL", 0)
    with timed(tmp_path, "shards", workers=1):
        pass
    ((row, _),) = read_attempts(tmp_path)
    assert row["data/finished"] == 1


def test_an_attempt_of_long_ago_is_left_out_where_fresh_ones_are_asked_for(tmp_path: Path) -> None:
    for name, age_s in (("fresh", 0), ("old", 3600)):
        write_attempt(tmp_path, name, row_of(name, 150, 50))
        os.utime(tmp_path / f"{name}.jsonl", (time.time() - age_s,) * 2)
    assert len(read_attempts(tmp_path)) == 2
    ((row, _),) = read_attempts(tmp_path, fresh_s=60)
    assert row["data/part"] == "fresh"


def test_a_run_without_metrics_has_no_totals(tmp_path: Path) -> None:
    assert read_totals(tmp_path) == []
