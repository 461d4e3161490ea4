from typing import Any

import pytest

from parallel.pipeline.bubble import predicted_bubble, replayed_bubble
from parallel.pipeline.plan import Action, one_stage_order


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("pp", "microbatches"), [(2, 2), (4, 4), (4, 13), (8, 32)])
def test_the_bubble_is_that_of_theory(schedule: Any, pp: int, microbatches: int) -> None:
    orders = [one_stage_order(schedule, pp, rank, microbatches) for rank in range(pp)]
    assert predicted_bubble(orders) == pytest.approx((pp - 1) / (microbatches + pp - 1))


def test_stages_wait_for_the_slowest_of_them() -> None:
    seconds = {0: 1.0, 1: 3.0}
    ranks = [
        [(action, seconds[rank]) for action in one_stage_order("1f1b", 2, rank, 3)]
        for rank in range(2)
    ]
    # The second rank computes for 18 of 20 s, the first for 6.
    assert replayed_bubble(ranks) == pytest.approx(1 - 24 / 40)


def test_gradients_of_weights_fill_what_would_be_waiting() -> None:
    whole = [
        [Action("forward", 0, 0), Action("forward", 0, 1), Action("backward", 0, 0)],
        [Action("forward", 1, 0), Action("backward", 1, 0), Action("forward", 1, 1)],
    ]
    halves = [
        *whole[:1],
        [
            Action("forward", 1, 0),
            Action("input", 1, 0),
            Action("forward", 1, 1),
            Action("weight", 1, 0),
        ],
    ]
    assert predicted_bubble(halves) < predicted_bubble(whole)
