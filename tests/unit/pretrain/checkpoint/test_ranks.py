"""Ranks share what is to be written and read, and find the same on all of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.manifest import MANIFEST
from tests.ranks import run_on_ranks

CASES = Path(__file__).with_name("store_cases.py")
FIRST, SECOND = (f"attempt-0001-rank-0000{rank}.safetensors" for rank in range(2))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(2, CASES, str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_rank_0_alone_lists_checkpoints_and_reads_what_describes_them(
    results: list[dict[str, Any]],
) -> None:
    assert {"checkpoints", MANIFEST} <= set(results[0]["asked for"])
    assert results[1]["asked for"] == [FIRST, SECOND]


def test_ranks_share_the_bytes_that_both_hold(results: list[dict[str, Any]]) -> None:
    first, second = results[0]["written"]
    assert max(first, second) < 1.5 * min(first, second)


def test_what_both_hold_is_made_by_the_one_that_saves_it(results: list[dict[str, Any]]) -> None:
    assert sorted(of_rank["made"] for of_rank in results) == [0, 1]


def test_what_one_rank_cannot_read_is_told_on_all(results: list[dict[str, Any]]) -> None:
    for of_rank in results:
        assert of_rank["cannot be read"].startswith("AttemptError: ")
        assert SECOND in of_rank["cannot be read"]
        assert "Input/output error" in of_rank["cannot be read"]


def test_an_error_of_any_kind_on_one_rank_is_told_on_all(results: list[dict[str, Any]]) -> None:
    told = [of_rank["fails in another way"] for of_rank in results]
    assert told == ["RuntimeError: no answer"] * 2


def test_what_one_rank_finds_damaged_no_rank_loads(results: list[dict[str, Any]]) -> None:
    assert [of_rank["damaged"] for of_rank in results] == [[1, True, False]] * 2


def test_what_does_not_fit_one_rank_is_refused_on_all(results: list[dict[str, Any]]) -> None:
    told = [of_rank["of another shape on rank 1"] for of_rank in results]
    assert told[0] == told[1]
    assert told[0].startswith("UserError: ")
    assert "model.0.weight is [8, 6] there, [9, 6] here" in told[0]
