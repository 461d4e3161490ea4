"""Splitting layers into stages, and what each schedule demands."""

import subprocess
import sys
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline.plan import (
    Schedule,
    consecutive,
    one_stage_order,
    peak_stored,
    problem_of_layers,
    problem_of_schedule,
    split_layers,
    stages_of_rank,
)

STAGES_PER_RANK: dict[Schedule, int] = {
    "gpipe": 1,
    "1f1b": 1,
    "interleaved": 2,
    "zbv": 2,
    "dualpipev": 2,
}


def torch_schedule(schedule: Schedule, pp: int, n_microbatches: int) -> Any:
    from parallel.pipeline.schedule import SCHEDULES

    per_rank = STAGES_PER_RANK[schedule]
    stages = [
        SimpleNamespace(
            num_stages=pp * per_rank, group_size=pp, group_rank=0, stage_index=index, submod=None
        )
        for index in range(per_rank)
    ]
    return SCHEDULES[schedule](stages[0] if per_rank == 1 else stages, n_microbatches)


@pytest.mark.parametrize("schedule", STAGES_PER_RANK)
def test_accepts_the_microbatches_that_torch_accepts(schedule: Schedule) -> None:
    for pp in (2, 3, 4):
        for n_microbatches in range(1, 13):
            problem = problem_of_schedule(schedule, pp, STAGES_PER_RANK[schedule], n_microbatches)
            if problem is None:
                torch_schedule(schedule, pp, n_microbatches)
            else:
                with pytest.raises(ValueError, match="microbatches"):
                    torch_schedule(schedule, pp, n_microbatches)


@pytest.mark.parametrize(
    ("schedule", "per_rank"),
    [("gpipe", 2), ("1f1b", 2), ("interleaved", 1), ("zbv", 1), ("dualpipev", 3)],
)
def test_refuses_another_number_of_stages(schedule: Schedule, per_rank: int) -> None:
    problem = problem_of_schedule(schedule, 2, per_rank, 8)
    assert problem is not None
    assert f"parallel.pipeline.stages_per_rank = {per_rank}" in problem


@pytest.mark.parametrize("schedule", ["interleaved", "zbv", "dualpipev"])
def test_places_stages_where_torch_looks_for_them(schedule: Schedule) -> None:
    placed = torch_schedule(schedule, 4, 8).stage_index_to_group_rank
    ours = {stage: rank for rank in range(4) for stage in stages_of_rank(schedule, 4, rank, 2)}
    assert ours == placed


costs = st.lists(st.floats(0.1, 10), min_size=1, max_size=8)


@given(costs, st.integers(1, 8), st.floats(0, 20), st.floats(0, 20))
def test_no_split_has_a_faster_slowest_stage(
    costs: list[float], n_stages: int, first: float, last: float
) -> None:
    n_stages = min(n_stages, len(costs))

    def slowest(stages: list[range]) -> float:
        times = [sum(costs[layer] for layer in layers) for layers in stages]
        times[0] += first
        times[-1] += last
        return max(times)

    stages = split_layers(costs, n_stages, first, last)
    assert [layer for layers in stages for layer in layers] == list(range(len(costs)))
    assert all(len(layers) for layers in stages)
    cuts = combinations(range(1, len(costs)), n_stages - 1)
    best = min(
        slowest([range(a, b) for a, b in zip([0, *cut], [*cut, len(costs)], strict=True)])
        for cut in cuts
    )
    assert slowest(stages) == pytest.approx(best)


def test_a_heavy_head_leaves_the_other_stages_even() -> None:
    stages = split_layers([1.0] * 10, 4, last=8.0)
    assert [len(layers) for layers in stages] == [3, 3, 3, 1]


def test_a_list_of_layers_may_leave_the_ends_empty() -> None:
    assert problem_of_layers([0, 4, 4, 0], 8, 4) is None
    assert consecutive([0, 4, 4, 0]) == [range(0), range(4), range(4, 8), range(8, 8)]


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([4, 4], "2 entries for 4 stages"),
        ([2, 2, 2, 1], "adds up to 7, not to model.n_layers = 8"),
        ([4, 0, 2, 2], "only the first stage"),
        ("balanced", "model.n_layers = 8 are fewer than the pipeline's 9 stages"),
    ],
)
def test_refuses_layers_that_do_not_fit(layers: Any, reason: str) -> None:
    problem = problem_of_layers(layers, 8, 9 if layers == "balanced" else 4)
    assert problem is not None
    assert reason in problem


@pytest.mark.parametrize(("schedule", "stored"), [("gpipe", [8, 8, 8]), ("1f1b", [3, 2, 1])])
def test_stored_microbatches(schedule: Schedule, stored: list[int]) -> None:
    orders = [one_stage_order(schedule, 3, rank, 8) for rank in range(3)]
    assert [peak_stored(order, lambda stage: 1) for order in orders] == stored


def test_needs_no_torch() -> None:
    check = "import sys, parallel.pipeline.plan; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
