from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel import stopwatch
from parallel.comm import Pending
from parallel.stopwatch import Stopwatch


class Clock:
    """Stands in for time.perf_counter()."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: self.now)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_time_is_taken_once(clock: Clock) -> None:
    watch = Stopwatch()
    for seconds in (1.0, 2.0):
        with watch.running(torch.device("cpu")):
            clock.pass_time(seconds)
        clock.pass_time(10.0)
    assert watch.take() == 3.0
    assert watch.take() == 0.0


def test_time_on_a_gpu_that_nobody_takes_needs_no_more_and_more_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...
        def synchronize(self) -> None: ...
        def query(self) -> bool:
            return True

        def elapsed_time(self, end: "Event") -> float:
            return 1000.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch()
    for _ in range(2 * stopwatch.MOST_SPANS + 3):
        with watch.running(torch.device("cuda")):
            pass
        assert len(watch._spans) < stopwatch.MOST_SPANS
    assert watch.take() == 2 * stopwatch.MOST_SPANS + 3
    assert watch.take() == 0.0


def test_a_collective_keeps_waiting_from_when_it_is_needed(clock: Clock) -> None:
    comm: Any = SimpleNamespace(naming=lambda kind: nullcontext(), waited=Stopwatch())
    work: Any = SimpleNamespace(wait=lambda: clock.pass_time(0.5))
    out = torch.zeros(2)
    pending = Pending(comm, "all_gather", work, out, out)
    clock.pass_time(7.0)
    pending.wait()
    assert comm.waited.take() == 0.5
    # What a second forward pass takes from the first has arrived.
    Pending(comm, "all_gather", None, out, out).wait()
    assert comm.waited.take() == 0.0
