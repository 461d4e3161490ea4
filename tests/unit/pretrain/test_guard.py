"""What counts as a spike, and how a run gets past one."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import GuardConfig
from pretrain.errors import TrainingError
from pretrain.guard import Guard, Past, Place

BATCH = 100


def place(batch: int) -> Place:
    return Place(batch * BATCH, (batch + 1) * BATCH)


def trained(steps: int, **config: object) -> Guard:
    """A guard that has seen an ordinary loss curve."""
    guard, draw = Guard(GuardConfig(**config), Past()), random.Random(0)
    for step in range(steps):
        loss = 3 + 5 / (1 + step / 20) + draw.gauss(0, 0.1)
        assert guard.judge(loss, math.exp(draw.gauss(0, 0.3))) is None
    return guard


def test_an_ordinary_curve_has_no_spike() -> None:
    trained(1000)


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1), (math.inf, 1), (3, math.nan), (3, math.inf)]
)
def test_what_is_not_finite_is_skipped_from_the_first_step_on(loss: float, norm: float) -> None:
    for guard in (Guard(GuardConfig(), Past()), trained(100)):
        verdict = guard.judge(loss, norm)
        assert verdict is not None
        assert verdict.kind == "skip"
        assert ("loss" if not math.isfinite(loss) else "gradient norm") in verdict.reason


@pytest.mark.parametrize(("loss", "norm", "what"), [(9, 1, "loss"), (3.6, 1e4, "gradient norm")])
def test_a_spike_rolls_back_and_does_not_hide_the_next(loss: float, norm: float, what: str) -> None:
    guard = trained(200)
    for _ in range(100):
        verdict = guard.judge(loss, norm)
        assert verdict is not None
        assert verdict.kind == "roll back"
        assert f"the {what} is {loss if what == 'loss' else norm:.6g}" in verdict.reason
        assert "of the last 128 steps" in verdict.reason


def test_there_are_no_spikes_before_enough_is_known_or_if_switched_off() -> None:
    assert trained(31).judge(1e6, 1e6) is None
    assert trained(100, spike_sigmas=None).judge(1e6, 1e6) is None


@given(st.floats(0, 20), st.floats(0, 20))
def test_a_ripple_of_a_flat_curve_is_no_spike_but_a_jump_is(loss: float, norm: float) -> None:
    guard = Guard(GuardConfig(), Past())
    for _ in range(40):
        assert guard.judge(loss, norm) is None
    assert guard.judge(1.1 * loss, 1.5 * norm) is None
    assert guard.judge(loss + 50, norm) is not None
    assert guard.judge(loss, 100 * norm + 1) is not None


def test_its_memory_is_restored() -> None:
    guard, other = trained(200), Guard(GuardConfig(), Past())
    other.load_state([list(pair) for pair in guard.state()])  # as JSON gives it back
    assert other.state() == guard.state()
    assert other.judge(9, 1) == guard.judge(9, 1)


def test_a_skipped_batch_is_skipped_again_by_this_attempt_and_the_next() -> None:
    guard = trained(50)
    guard.skip(51, place(50), "the loss is nan")
    again = Guard(GuardConfig(), Past([(50 * BATCH, 51 * BATCH)]))
    for one in (guard, again):
        assert one.passes_over(place(50))
        assert one.passes_over(Place(50 * BATCH + 99, 51 * BATCH + 50))
        assert not one.passes_over(place(49))
        assert not one.passes_over(place(51))


def test_a_second_spike_at_the_same_place_widens_the_skip() -> None:
    guard = trained(200)
    first = guard.roll_back(200, place(199), "spike")
    assert (first.to_step, first.skip) == (199, Place(19900, 20000))
    second = guard.roll_back(200, place(200), "spike")
    assert (second.to_step, second.skip) == (198, Place(19900, 20200))
    third = guard.roll_back(203, place(202), "spike")
    assert (third.to_step, third.skip) == (199, Place(19900, 20600))
    assert guard.passes_over(place(205))
    assert not guard.passes_over(place(206))


def test_it_never_goes_back_to_before_the_first_step() -> None:
    guard = trained(0)
    assert [guard.roll_back(1, place(batch), "spike").to_step for batch in (0, 1, 2)] == [0, 0, 0]


def test_a_new_attempt_does_not_forget_how_often_it_has_gone_back() -> None:
    config = GuardConfig(max_rollbacks=2)
    first = trained(200, max_rollbacks=2).roll_back(200, place(199), "spike")
    again = Guard(config, Past([], first.nearby, first.settled_at))
    second = again.roll_back(200, place(200), "spike")
    assert (second.to_step, second.skip) == (198, Place(19900, 20200))
    with pytest.raises(TrainingError, match="after 2 rollbacks nearby"):
        Guard(config, Past([], second.nearby, second.settled_at)).roll_back(
            203, place(202), "spike"
        )


def test_a_spike_elsewhere_is_another_one() -> None:
    guard = trained(200)
    for batch in (200, 400, 600, 800, 1000, 1200):
        rollback = guard.roll_back(batch, place(batch), "spike")
        assert (rollback.to_step, rollback.skip) == (batch - 1, place(batch))


def test_the_run_ends_when_rollbacks_do_not_help() -> None:
    guard = trained(200, max_rollbacks=2)
    guard.roll_back(200, place(200), "the loss is 9")
    guard.roll_back(200, place(201), "the loss is 9")
    with pytest.raises(TrainingError, match="the loss is 9 at step 200, after 2 rollbacks nearby"):
        guard.roll_back(200, place(203), "the loss is 9")


def test_the_run_ends_when_nothing_is_finite_any_more() -> None:
    guard = Guard(GuardConfig(max_skips=2), Past())
    for _ in range(5):
        guard.skip(1, place(0), "the loss is nan")
        assert guard.judge(3, 1) is None
    guard.skip(1, place(0), "the loss is nan")
    guard.skip(1, place(1), "the loss is nan")
    with pytest.raises(TrainingError, match="the loss is nan at step 1, and so it was for the 2"):
        guard.skip(1, place(2), "the loss is nan")


@pytest.mark.parametrize("can_replay", [True, False])
def test_a_replay_is_named_for_the_engine_that_has_one(can_replay: bool) -> None:
    guard = Guard(GuardConfig(max_skips=0, max_rollbacks=0), Past(), can_replay=can_replay)
    for ends in (guard.skip, guard.roll_back):
        with pytest.raises(TrainingError, match="The checkpoints are from before") as ended:
            ends(7, place(6), "the loss is nan")
        assert ("farspan replay RUN --step 7" in str(ended.value)) == can_replay
