"""Who is slower than the others, and for how long."""

import pytest

from parallel.heartbeat import Work
from parallel.stragglers import Slowest, StragglerDetector


class Job:
    """Ranks that report every 10 steps; `seconds` a step and rank."""

    def __init__(self, ranks: int) -> None:
        self.detector = StragglerDetector()
        self.works = [Work(0, 0.0)] * ranks
        self.detector.compare(self.works)

    def go_on(self, *seconds: float, steps: int = 10) -> Slowest | None:
        self.works = [
            Work(work.steps + steps, work.busy_s + steps * each)
            for work, each in zip(self.works, seconds, strict=True)
        ]
        return self.detector.compare(self.works)


def test_the_slowest_is_compared_with_the_median() -> None:
    slowest = Job(4).go_on(1.0, 1.1, 3.0, 0.9)
    assert slowest is not None
    assert slowest.rank == 2
    assert slowest.over_median == pytest.approx(3.0)


def test_the_slower_of_two_is_compared_with_the_other() -> None:
    slowest = Job(2).go_on(2.0, 1.0)
    assert slowest is not None
    assert (slowest.rank, slowest.over_median) == (0, pytest.approx(2.0))


def test_only_one_that_stays_slowest_is_warned_of_and_once() -> None:
    job = Job(3)
    slow = (1.0, 1.0, 1.5)
    other = (1.5, 1.0, 1.0)
    even = (1.0, 1.0, 1.1)
    windows = [slow, slow, other, other, even, slow, slow, slow, slow, slow]
    warned = [(w := job.go_on(*seconds)) is not None and w.is_persistent for seconds in windows]
    assert warned == [False] * 7 + [True, False, False]


def test_a_window_has_five_steps_of_every_rank() -> None:
    job = Job(2)
    assert job.go_on(1.0, 2.0, steps=4) is None
    slowest = job.go_on(1.0, 5.0, steps=4)
    assert slowest is not None
    assert slowest.seconds == pytest.approx(3.5)


def test_ranks_that_are_at_different_steps_are_compared_per_step() -> None:
    detector = StragglerDetector()
    detector.compare([Work(0, 0.0), Work(0, 0.0)])
    slowest = detector.compare([Work(20, 20.0), Work(19, 19.0)])
    assert slowest is not None
    assert slowest.over_median == pytest.approx(1.0)


def test_among_ranks_that_only_wait_none_is_slowest() -> None:
    assert Job(2).go_on(0.0, 0.0) is None


def test_one_among_ranks_that_only_wait_is_a_hundred_times_slower() -> None:
    slowest = Job(3).go_on(0.0, 2.0, 0.0)
    assert slowest is not None
    assert slowest.over_median == pytest.approx(100.0)
