"""How long a rank may be silent, and what it has done."""

import time

import pytest

from parallel.heartbeat import Heartbeat, longest_silence_s

TIMEOUT_S = 10.0


def silent_after(heart: Heartbeat, seconds: float) -> bool:
    """Whether the rank is overdue once it has been silent for so long."""
    heart.pass_time(0.0)
    heart.pass_time(seconds)
    return heart.is_overdue()


def go_through(heart: Heartbeat, step: int, phase: str, seconds: float) -> None:
    heart.beat(step, phase)
    assert not silent_after(heart, seconds)


def test_a_phase_may_take_four_times_as_long_when_it_happens_first() -> None:
    heart = Heartbeat(TIMEOUT_S)
    assert not silent_after(heart, 39)
    go_through(heart, 1, "data", 39)
    go_through(heart, 1, "forward", 39)
    heart.beat(1, "checkpoint")
    assert silent_after(heart, 41)


def test_a_phase_that_has_ended_may_take_the_timeout() -> None:
    heart = Heartbeat(TIMEOUT_S)
    go_through(heart, 1, "data", 1)
    go_through(heart, 1, "forward", 1)
    go_through(heart, 2, "data", 9)
    heart.beat(2, "forward")
    assert silent_after(heart, 11)


def test_a_phase_that_has_taken_long_before_may_take_twice_as_long() -> None:
    heart = Heartbeat(TIMEOUT_S)
    go_through(heart, 1, "forward", 15)
    go_through(heart, 1, "data", 1)
    go_through(heart, 2, "forward", 29)
    heart.beat(2, "data")
    assert silent_after(heart, 11)


def test_no_phase_may_take_more_than_four_times_the_timeout() -> None:
    heart = Heartbeat(TIMEOUT_S)
    go_through(heart, 1, "forward", 30)
    go_through(heart, 1, "data", 1)
    go_through(heart, 2, "forward", 39)
    go_through(heart, 2, "data", 1)
    heart.beat(3, "forward")
    assert silent_after(heart, longest_silence_s(TIMEOUT_S) + 1)


def test_a_slow_phase_may_always_take_four_times_as_long() -> None:
    heart = Heartbeat(TIMEOUT_S)
    for step in (1, 2):
        heart.beat(step, "checkpoint", is_slow=True)
        assert not silent_after(heart, 1)
        go_through(heart, step + 1, "data", 1)
    heart.beat(3, "checkpoint", is_slow=True)
    assert not silent_after(heart, 39)
    assert silent_after(heart, 2)


def test_a_beat_ends_the_silence() -> None:
    heart = Heartbeat(TIMEOUT_S)
    heart.beat(1, "forward")
    heart.beat(2, "forward")
    for step in range(3, 30):
        assert not silent_after(heart, 9)
        heart.beat(step, "forward")


def test_work_is_the_time_outside_of_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    heart = Heartbeat(TIMEOUT_S)
    heart.waited_s = 7.0
    heart.beat(5, "data")
    now += 4.0
    heart.beat(5, "forward")
    now += 6.0
    heart.waited_s = 10.0
    assert heart.work is not None
    assert heart.work.steps == 0
    heart.beat(6, "data")
    assert (heart.work.steps, heart.work.busy_s) == (1, pytest.approx(7.0))
    now += 2.0
    heart.beat(3, "data")
    assert (heart.work.steps, heart.work.busy_s) == (2, pytest.approx(9.0))
