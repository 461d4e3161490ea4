"""The learning rate over a run."""

import pytest

from pretrain.config import ScheduleConfig
from pretrain.schedule import learning_rate

PEAK = 2.0


def rates(steps: int, **settings: object) -> list[float]:
    schedule = ScheduleConfig(**settings)
    return [learning_rate(step, steps, PEAK, schedule) for step in range(steps)]


def test_warmup_rises_linearly_to_the_peak() -> None:
    assert rates(100, name="constant", warmup_steps=4)[:5] == pytest.approx([0.5, 1, 1.5, 2, 2])


def test_cosine_falls_from_the_peak_to_the_minimum() -> None:
    got = rates(1000, name="cosine", warmup_steps=10, min_lr=0.1)
    assert got[10] == PEAK
    assert got[10 + 495] == pytest.approx(PEAK * 0.55)
    assert got[-1] == pytest.approx(PEAK * 0.1, rel=1e-4)
    assert got[10:] == sorted(got[10:], reverse=True)


def test_wsd_is_flat_and_then_decays_linearly() -> None:
    got = rates(100, name="wsd", decay_share=0.2, min_lr=0.0)
    assert got[:81] == [PEAK] * 81
    assert got[90] == pytest.approx(PEAK / 2)
    assert got[99] == pytest.approx(PEAK * 0.05)
