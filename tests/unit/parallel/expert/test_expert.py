"""Experts spread over ranks give what one rank does, for every option of the router."""

from pathlib import Path

import pytest

from tests.ranks import run_on_ranks

SCRIPT = Path(__file__).with_name("expert_cases.py")


@pytest.mark.parametrize("ranks", [2, 4])
def test_experts_spread_over_ranks_equal_one_rank(ranks: int) -> None:
    run_on_ranks(ranks, SCRIPT)
