"""Collectives: their results, gradients, counts and errors."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_on_ranks

SCRIPT = Path(__file__).with_name("comm_cases.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of rank 0; the script itself compares results and gradients with their definition."""
    folder = tmp_path_factory.mktemp("comm")
    run_on_ranks(2, SCRIPT, str(folder))
    return torch.load(folder / "results.pt")


def test_calls_and_bytes_are_counted_by_kind(results: dict[str, Any]) -> None:
    shard_bytes = 2 * 6 * 5 * 4
    assert results["calls"] == {
        "all_gather": 2,
        "reduce_scatter": 2,
        "all_reduce": 1,
        "all_to_all": 1,
    }
    assert results["bytes"] == {
        "all_gather": 2 * shard_bytes,
        "reduce_scatter": 2 * shard_bytes,
        "all_reduce": 4 * 4,
        "all_to_all": 2 * 2 * 4,
    }


def test_the_error_names_the_collective_the_axis_and_the_ranks(results: dict[str, Any]) -> None:
    expected = "all_gather along axis tp failed on rank 0; it takes part with the ranks [0, 1]: "
    assert results["error"].startswith(expected)
