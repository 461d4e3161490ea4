"""Every layout gives the losses, the gradients and the weights of one rank."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.conftest import STEPS, TOLERANCE, CompareAll
from tests.parity.matrix import Difference, Ranks
from tests.parity.models import MODELS, Setting, layouts, schedule

CLIP = 0.5


def dealt() -> Iterator[Setting]:
    """All layouts of four ranks, each with the two models whose turn it is under its schedule."""
    turns: dict[Any, Iterator[str]] = {}
    for (layout, options), data in zip(layouts(4), cycle(["packed", "whole", "packed"])):
        of_experts = "ep=" in layout
        models = [name for name in MODELS if name.endswith("moe") or not of_experts]
        # Each schedule begins with another one.
        turn = cycle(models[(len(turns) + i) % len(models)] for i in range(len(models)))
        turn = turns.setdefault((options, of_experts), turn)
        for _ in range(2):
            yield Setting(next(turn), data, layout, options)


ONE_AXIS = [
    Setting("hybrid-moe", "packed", "dp_shard=2"),
    Setting("tied", "whole", "dp_replicate=2"),
    Setting("hybrid", "packed", "tp=2"),
    Setting("linear-moe", "packed", "dp_shard=2 ep=2"),
    Setting("tied", "packed", "pp=2", (schedule("gpipe"),)),
    Setting("hybrid-moe", "packed", "pp=2", (schedule("1f1b"),)),
    Setting("softmax-moe", "packed", "pp=2", (schedule("interleaved"),)),
    Setting("tied", "packed", "pp=2", (schedule("zbv"),)),
    Setting("hybrid-moe", "packed", "pp=2", (schedule("dualpipev"),)),
    Setting("hybrid-moe", "packed", "dp_shard=4", ("train.microbatch=1",)),
    Setting("softmax-moe", "packed", "dp_shard=4 ep=4"),
    Setting("hybrid-moe", "whole", "tp=4"),
    Setting("linear", "packed", "pp=4", (schedule("1f1b"),)),
]
TWO_AXES = [
    Setting("hybrid-moe", "packed", "dp_replicate=2 dp_shard=2"),
    Setting("linear-moe", "packed", "dp_shard=2 tp=2"),
    Setting("tied", "packed", "dp_replicate=2 tp=2"),
    Setting("tied-moe", "packed", "pp=2 dp_shard=2", (schedule("zbv"),)),
    Setting("softmax", "packed", "pp=2 dp_replicate=2", (schedule("dualpipev"),)),
    Setting("tied", "packed", "pp=2 tp=2", (schedule("interleaved"),)),
    Setting("tied-moe", "packed", "dp_shard=4 ep=2"),
    Setting("softmax-moe", "packed", "dp_replicate=2 dp_shard=2 ep=2"),
    Setting("linear-moe", "packed", "tp=2 ep=2"),
    Setting("hybrid-moe", "packed", "pp=2 dp_shard=2 ep=2", (schedule("dualpipev"),)),
]
THREE_AXES = [
    Setting("hybrid-moe", "packed", "dp_shard=2 tp=2 ep=4"),
    Setting("hybrid-moe", "packed", "dp_replicate=2 tp=2 ep=2"),
    Setting("tied-moe", "packed", "pp=2 tp=2 ep=2", (schedule("1f1b"),)),
    Setting("hybrid-moe", "packed", "pp=2 dp_shard=2 tp=2 ep=2", (schedule("zbv"),)),
]
CONTEXT = [
    Setting("hybrid-moe", "whole", "cp=2"),
    Setting("hybrid-moe", "packed", "cp=2"),
    Setting("sliding", "packed", "cp=4"),
    Setting("linear-moe", "packed", "cp=4"),
    Setting("softmax-moe", "packed", "cp=4", ("parallel.ulysses=2",)),
    Setting("tied", "packed", "cp=2", ("parallel.ulysses=2",)),
    Setting("linear-moe", "packed", "cp=2 tp=2"),
    Setting("hybrid-moe", "packed", "cp=2 tp=2 ep=4", ("parallel.recompute=selective",)),
    Setting("tied-moe", "packed", "pp=2 cp=2", (schedule("zbv"),)),
    Setting("hybrid-moe", "packed", "dp_shard=2 cp=2 ep=2", ("parallel.recompute=full",)),
    Setting("sliding", "whole", "dp_replicate=2 cp=2"),
]
OPTIONS = [
    Setting("hybrid-moe", "packed", "dp_shard=2 ep=2", ("parallel.recompute=selective",)),
    Setting("hybrid-moe", "packed", "dp_shard=2 ep=2", ("parallel.recompute=full",)),
    Setting(
        "tied-moe",
        "packed",
        "pp=2",
        (schedule("zbv"), "parallel.recompute=[selective, full, none]"),
    ),
    Setting("linear-moe", "packed", "tp=2", ("parallel.recompute=selective",)),
    Setting(
        "tied", "packed", "pp=2", (schedule("1f1b"), "parallel.pipeline.layers_per_stage=[3, 1]")
    ),
    Setting("hybrid-moe", "packed", "dp_shard=2", ("train.microbatch=1",)),
    # Of 64 or 128 tokens: the last tile is shorter.
    Setting(
        "hybrid-moe",
        "packed",
        "dp_shard=2 tp=2 ep=2",
        ("parallel.feed_forward_tile=24", "parallel.recompute=[full, selective]"),
    ),
    Setting("linear-moe", "packed", "cp=2 ep=2", ("parallel.feed_forward_tile=24",)),
    Setting("hybrid", "packed", "pp=2 tp=2", (schedule("zbv"), "parallel.feed_forward_tile=24")),
]
SEGMENTS = [
    Setting(
        "long-hybrid-moe",
        "packed",
        "dp_shard=2 ep=2",
        ("context.segments=4", "train.microbatch=1", "parallel.recompute=full"),
    ),
    Setting("long-sliding", "packed", "cp=4", ("context.segments=4",)),
    Setting(
        "long-linear-moe",
        "packed",
        "cp=2 tp=2",
        ("context.segments=2", "parallel.feed_forward_tile=24"),
    ),
]
EVERYTHING = [*dealt()]
ALL = ONE_AXIS + TWO_AXES + THREE_AXES + CONTEXT + OPTIONS + SEGMENTS

HALF = [
    Setting("hybrid-moe", "packed", "dp_shard=2 ep=2"),
    Setting("sliding", "packed", "cp=4", ("parallel.recompute=selective",)),
    *(pytest.param(setting, marks=pytest.mark.slow) for setting in CONTEXT),
]
EIGHT_RANKS = [
    Setting("hybrid-moe", "packed", "dp_shard=2 cp=2 tp=2"),
    Setting("hybrid-moe", "packed", "pp=2 cp=2 dp_shard=2 ep=2", (schedule("1f1b"),)),
    Setting("sliding", "packed", "cp=8", ("parallel.ulysses=4",)),
    Setting("linear-moe", "packed", "cp=4 tp=2 ep=2"),
]


def together(settings: Iterable[Setting]) -> list[Any]:
    """Parameters of a test: eight settings at most, on equally many ranks, which start once."""
    by_ranks: dict[int, list[Setting]] = {}
    for setting in settings:
        by_ranks.setdefault(setting.ranks, []).append(setting)
    return [
        pytest.param(group[first : first + 8], id=f"{group[first]} and so on")
        for group in by_ranks.values()
        for first in range(0, len(group), 8)
    ]


@pytest.mark.parametrize("settings", together(ALL))
def test_layouts_equal_one_rank(settings: Sequence[Setting], compare_all: CompareAll) -> None:
    assert not beyond_tolerance(compare_all(settings))


@pytest.mark.slow
@pytest.mark.parametrize("settings", together(EIGHT_RANKS + EVERYTHING))
def test_every_layout_of_four_ranks_and_some_of_eight_equal_one_rank(
    settings: Sequence[Setting], compare_all: CompareAll
) -> None:
    assert not beyond_tolerance(compare_all(settings))


def beyond_tolerance(found: dict[Setting, Difference]) -> list[str]:
    return [
        f"{setting}: {worst}" for setting, worst in found.items() if not worst.error <= TOLERANCE
    ]


def test_nothing_is_equal_because_it_is_nothing(one_rank: dict[str, Any]) -> None:
    assert all(gradient.norm() > 0 for gradient in one_rank["gradients"].values())
    assert max(one_rank["series"]["grad_norm"]) > CLIP, "clipping has not been at work"
    first, second, _ = one_rank["series"]["aux_loss"]
    assert first == pytest.approx(1, abs=1e-6), "uniform before the first step"
    assert abs(second - 1) > 1e-4


def test_rows_are_whole_or_packed(ranks: Ranks, parity_shards: Path) -> None:
    def documents(data: str) -> list[int]:
        setting = Setting("hybrid-moe", data)
        return ranks.run(1, setting.of_one_rank(parity_shards), STEPS).ranks[0]["documents"]

    assert max(documents("whole")) == 8
    assert min(documents("packed")) > 16


@pytest.mark.parametrize("setting", HALF, ids=str)
def test_bf16_is_as_close_to_float32_as_on_one_rank(
    setting: Setting, ranks: Ranks, parity_shards: Path
) -> None:
    half = "train.dtype=bfloat16"
    one_rank, overrides = setting.of_one_rank(parity_shards), setting.overrides(parity_shards)
    (exact,) = ranks.run(1, one_rank, STEPS).ranks
    (rounded,) = ranks.run(1, [*one_rank, half], STEPS).ranks
    for ours in ranks.run(setting.ranks, [*overrides, half], STEPS).ranks:
        assert ours["dtypes"] == {torch.float32}, "weights are float32"
        assert ours["series"]["loss"] != exact["series"]["loss"]
        assert ours["series"]["loss"] == pytest.approx(exact["series"]["loss"], rel=1e-4)
        names = ours["gradients"].keys()
        error, rounding = (distance(of, exact, names) for of in (ours, rounded))
        # Rounded scores choose other experts now and then, and not the same in every layout.
        assert error <= (2 if setting.model.endswith("moe") else 1.2) * rounding


def distance(ours: dict[str, Any], exact: dict[str, Any], names: Iterable[str]) -> float:
    """Of the gradients of these weights, taken as one vector."""
    norms = [(ours["gradients"][name] - exact["gradients"][name]).norm() for name in names]
    return float(torch.stack(norms).norm())


def test_experts_are_reached_by_all_to_all_only_where_they_are_spread(
    ranks: Ranks, parity_shards: Path
) -> None:
    def calls(layout: str) -> set[str]:
        setting = Setting("hybrid-moe", "packed", layout)
        return set(ranks.run(2, setting.overrides(parity_shards), STEPS).ranks[0]["calls"])

    assert calls("dp_shard=2") == set()
    assert calls("dp_shard=2 ep=2") == {"ep"}


def test_norms_of_layers_add_up_to_those_of_the_model(one_rank: dict[str, Any]) -> None:
    series = one_rank["series"]
    for whole, parts in zip(series["grad_norm"], series["grad_norms"], strict=True):
        # Embedding, four layers, and what comes after them.
        assert len(parts) == 6
        assert min(parts) > 0
        assert sum(part**2 for part in parts) == pytest.approx(whole**2, rel=1e-12)


@pytest.mark.parametrize("layout", ["dp_shard=2 ep=2", "dp_shard=2 tp=2 ep=4"])
def test_the_size_of_an_update_does_not_depend_on_the_layout(
    layout: str, one_rank: dict[str, Any], ranks: Ranks, parity_shards: Path
) -> None:
    setting = Setting("hybrid-moe", "packed", layout)
    spread = ranks.run(setting.ranks, setting.overrides(parity_shards), STEPS)
    assert min(one_rank["update_norms"]) > 0
    for rank in spread.ranks:
        assert rank["update_norms"] == pytest.approx(one_rank["update_norms"], rel=1e-3)
