"""A person sees how fast a crawl is cleaned, over all workers, while it is."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from data_pipeline import meter as meters
from data_pipeline.meter import Counter, Meter
from data_pipeline.recipe import load_recipe
from data_pipeline.run import run
from data_pipeline.sample import make_sample_crawl
from launch import progress
from launch.progress import show_progress


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_speeds_are_of_what_was_read_since_the_start(tmp_path: Path, clock: Clock) -> None:
    meter = Meter(tmp_path / "meter", [40_000_000, 500, 100_000_000], [False, True, False])
    assert meter.speed() == ""
    first, last = Counter(meter.path, 0), Counter(meter.path, 2)
    clock.now += 10
    first.count(10_000_000, 300, 120, 9_000)
    last.count(10_000_000, 700, 80, 1_000)
    assert meter.speed() == "2.0 MB/s, 100 documents/s, 20% pass, 1 min 0 s left"
    first.count(40_000_000, 900, 120, 9_000)
    last.count(100_000_000, 1100, 80, 1_000)
    assert meter.speed().endswith("10% pass, 0 s left")
    counts = meter.counts()
    assert {name: counts[name] for name in ("documents", "bytes_in", "bytes_out", "share")} == {
        "documents": 2000,
        "bytes_in": 140_000_000,
        "bytes_out": 10_000,
        "share": 1.0,
    }


def test_a_part_that_is_tried_again_counts_documents_once_and_all_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Meter(tmp_path / "meter", [1000], [False])
    for cpu_s in (7.0, 2.5):
        spent = iter([1.0, 1.0 + cpu_s])
        monkeypatch.setattr(meters.os, "times", lambda spent=spent: [next(spent), 0.0, 0.0, 0.0, 9])
        Counter(meter.path, 0).count(1000, 30, 20, 400)
    assert meter.counts() == {
        "documents": 30,
        "bytes_in": 1000,
        "bytes_out": 400,
        "cpu_s": 9.5,
        "share": 1.0,
    }


def test_a_run_tells_its_speed_and_counts_each_document_once(tmp_path: Path) -> None:
    crawl = make_sample_crawl(tmp_path / "crawl", pages=40, files=2, seed=0).files
    told: list[tuple[int, int, str]] = []

    def show(stage: str, done: int, total: int, detail: str = "") -> None:
        if stage == "clean":
            told.append((done, total, detail))

    inputs = [str(path) for path in crawl]
    result = run(
        inputs, tmp_path / "out", load_recipe("demo"), workers=2, vocab_size=300, progress=show
    )
    *_, (done, total, detail) = told
    assert (done, total) == (2, 2)
    found = re.fullmatch(r"[\d.]+ MB/s, [\d,]+ documents/s, (\d+)% pass, 0 s left", detail)
    assert found, detail
    documents = sum(row["documents"] for row in result.funnel)
    passed = sum(row["documents"] for row in result.funnel if row["stage"] in ("dedup", "shards"))
    assert int(found[1]) == round(100 * passed / documents)


def test_a_log_has_a_line_per_tenth_and_one_a_minute_in_between(clock: Clock) -> None:
    printed = io.StringIO()
    with show_progress(Console(file=printed, width=200)) as show:
        for done in range(21):
            show("clean", done, 20, "5 MB/s")
            show("clean", done, 20, "6 MB/s")
        clock.now += 61
        show("clean", 20, 20, "7 MB/s")
        show("clean", 20, 20, "8 MB/s")
        show("dedup", 0, 1)
    lines = printed.getvalue().splitlines()
    assert lines[:2] == ["clean: 0 of 20, 5 MB/s", "clean: 2 of 20, 5 MB/s"]
    assert lines[-3:] == [
        "clean: 20 of 20, 5 MB/s",
        "clean: 20 of 20, 7 MB/s",
        "dedup: 0 of 1",
    ]
    assert len(lines) == 13
