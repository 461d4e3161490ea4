"""Rows in segments have the gradient of whole rows."""

import json
from pathlib import Path

import pytest

from parallel.layout import AttentionCost, costs
from parallel.segments.documents import cut_rows
from parallel.segments.memory import SegmentMemory
from tests.ranks import run_on_ranks

CASES = Path(__file__).with_name("segment_cases.py")
LONG_CASE = Path(__file__).with_name("long_case.py")
ALLOWED = 1e-12


Errors = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Errors]:
    """By the number of ranks."""
    found = tmp_path_factory.mktemp("segments") / "errors.json"
    by_ranks = {}
    for ranks in (1, 4):
        run_on_ranks(ranks, CASES, str(found))
        by_ranks[ranks] = json.loads(found.read_text())
    return by_ranks


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_gradient_is_exact(errors: dict[int, Errors], ranks: int) -> None:
    exact = errors[ranks]["exact"]
    assert not {case: error for case, error in exact.items() if not error <= ALLOWED}


@pytest.mark.parametrize("tokens", [4096, pytest.param(65536, marks=pytest.mark.slow)])
def test_the_gradient_of_a_long_row_with_full_attention_is_exact(
    tokens: int, tmp_path: Path
) -> None:
    run_on_ranks(1, LONG_CASE, str(tokens), "8", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["error"] <= ALLOWED
    # No weight's gradient is nothing.
    assert found["least norm"] > 1e-6


@pytest.mark.parametrize("ranks", [1, 4])
def test_rows_go_on_where_those_of_the_batch_before_have_ended(
    errors: dict[int, Errors], ranks: int
) -> None:
    lanes = errors[ranks]["lanes"]
    assert not {case: error for case, error in lanes.items() if not error <= ALLOWED}


def test_layers_without_a_window_begin_anew_with_each_row(errors: dict[int, Errors]) -> None:
    # Positions go on, and cos and sin of them are float32.
    assert max(errors[1]["anew"].values()) <= 1e-6


def test_with_less_reach_it_is_cut_between_groups_and_nowhere_else(
    errors: dict[int, Errors],
) -> None:
    cut = errors[1]["cut"]
    assert cut["loss, apart"] <= ALLOWED
    assert cut["loss, over"] <= ALLOWED
    assert cut["gradient, apart"] <= ALLOWED
    assert cut["gradient, over"] > 1e-3


def test_a_segment_knows_what_came_before() -> None:
    first, second, third, last = cut_rows([[3, 7, 2], [12]], 4, SegmentMemory(4))
    assert first.lengths == ((3,), (3,))
    assert second.lengths == ((3,), (3,))
    assert [layout.earlier for layout in first.layouts] == [0, 0]
    assert [layout.earlier for layout in second.layouts] == [0, 3]
    assert [layout.earlier for layout in third.layouts] == [3, 6]
    assert last.lengths == ((1, 2), (3,))
    assert [layout.earlier for layout in last.layouts] == [6, 9]
    assert last.position.tolist() == [[6, 0, 1], [9, 10, 11]]
    assert (last.first_seen, last.is_last_seen) == (0, True)


@pytest.mark.parametrize("row", [[7680, 512], [7300, 892], [3000, 5192]])
def test_ranks_share_what_the_end_of_a_long_document_costs(row: list[int]) -> None:
    for segment in cut_rows([row], 8, SegmentMemory(8), ranks=4, cost=AttentionCost()):
        of_ranks = costs(segment.layouts[0], AttentionCost())
        assert max(of_ranks) <= 1.02 * sum(of_ranks) / 4


def test_what_no_later_segment_sees_is_not_kept() -> None:
    rows = [[3, 4, 5], [3, 9]]
    documents = cut_rows(rows, 4, SegmentMemory(4))
    assert [segment.is_last_seen for segment in documents] == [True, False, False, True]
    assert [segment.first_seen for segment in documents] == [0, 1, 1, 1]
