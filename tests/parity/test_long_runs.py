"""Losses stay equal step after step, as far as rounding lets them."""

from pathlib import Path
from typing import Any

import pytest

from tests.parity.conftest import TOLERANCE
from tests.parity.matrix import Ranks, difference
from tests.parity.models import Setting, schedule


def slow(setting: Setting) -> Any:
    return pytest.param(setting, marks=pytest.mark.slow)


DENSE = [
    Setting("tied", "packed", "dp_replicate=2 tp=2"),
    slow(Setting("tied", "packed", "pp=2 tp=2", (schedule("zbv"),))),
    slow(Setting("hybrid", "packed", "dp_replicate=2 dp_shard=2")),
    slow(Setting("sliding", "packed", "cp=2 tp=2")),
    slow(Setting("softmax", "whole", "tp=4", ("parallel.recompute=selective",))),
]
MIXTURES = [
    Setting("hybrid-moe", "packed", "dp_shard=2 tp=2 ep=2"),
    slow(Setting("softmax-moe", "packed", "pp=2 dp_shard=2 ep=2", (schedule("interleaved"),))),
    slow(Setting("tied-moe", "whole", "dp_replicate=2 tp=2 ep=2")),
    slow(Setting("hybrid-moe", "packed", "dp_shard=2 cp=2 ep=2")),
]
REPLAYED = [
    Setting(
        "hybrid-moe",
        "packed",
        "tp=2 ep=2",
        ("train.microbatch=4", "parallel.recompute=[full, selective]"),
    ),
    slow(Setting("hybrid-moe", "packed", "dp_shard=2 tp=2 ep=4")),
    slow(Setting("hybrid-moe", "packed", "cp=4 ep=2")),
    slow(Setting("linear-moe", "packed", "pp=2 dp_shard=2 ep=2", (schedule("dualpipev"),))),
]


@pytest.mark.parametrize("setting", DENSE, ids=str)
def test_a_dense_model_stays_equal(setting: Setting, ranks: Ranks, parity_shards: Path) -> None:
    one_rank = ranks.run(1, setting.of_one_rank(parity_shards), 20)
    worst = difference(ranks.run(setting.ranks, setting.overrides(parity_shards), 20), one_rank)
    assert worst.error <= TOLERANCE, worst


@pytest.mark.parametrize("setting", MIXTURES, ids=str)
def test_a_mixture_stays_equal_for_six_steps(
    setting: Setting, ranks: Ranks, parity_shards: Path
) -> None:
    one_rank = ranks.run(1, setting.of_one_rank(parity_shards), 6)
    worst = difference(ranks.run(setting.ranks, setting.overrides(parity_shards), 6), one_rank)
    assert worst.error <= TOLERANCE, worst


@pytest.mark.parametrize("setting", REPLAYED, ids=str)
def test_a_mixture_stays_equal_where_no_choice_flips(
    setting: Setting, ranks: Ranks, parity_shards: Path
) -> None:
    one_rank = ranks.run(1, setting.of_one_rank(parity_shards), 20, routing="record")
    overrides = setting.overrides(parity_shards)
    ours = ranks.run(setting.ranks, overrides, 20, routing=str(one_rank.folder))
    worst = difference(ours, one_rank)
    assert worst.error <= TOLERANCE, worst
