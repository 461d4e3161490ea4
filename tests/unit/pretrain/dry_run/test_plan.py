"""Every shipped recipe is planned; what cannot be planned is refused."""

from multiprocessing import get_context

import pytest

from pretrain.config import load_config, recipe_names
from pretrain.dry_run.plan import Plan, plan_rank
from pretrain.errors import UserError

# Recipe -> the ranks it is meant for, and the memory of one of them in GiB.
MEANT_FOR = {
    "demo": (2, 8),
    "tiny": (4, 8),
    "tiny-hybrid-moe": (4, 8),
    "qwen3-next-80b": (4096, 72),
}


def plan_recipe(recipe: str) -> Plan:
    return plan_rank(load_config(recipe), MEANT_FOR[recipe][0], rank=0)


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    """Each planned in a process of its own, because torch keeps meshes of an earlier plan."""
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        return dict(zip(MEANT_FOR, pool.map(plan_recipe, MEANT_FOR, chunksize=1), strict=True))


def test_every_shipped_recipe_is_planned() -> None:
    assert set(MEANT_FOR) == set(recipe_names())


@pytest.mark.parametrize("recipe", MEANT_FOR)
def test_a_shipped_recipe_fits(recipe: str, plans: dict[str, Plan]) -> None:
    memory = plans[recipe].memory
    kept = memory.weights + memory.optimizer
    assert kept + memory.activations < memory.peak < MEANT_FOR[recipe][1] * 2**30


def test_a_large_model_is_spread_over_all_ranks(plans: dict[str, Plan]) -> None:
    plan = plans["qwen3-next-80b"]
    # The places of the pipeline have 9 to 13 of the 48 layers.
    assert plan.parameters == pytest.approx(80e9 / 4096, rel=0.15)
    assert plan.memory.optimizer == pytest.approx(2 * plan.memory.weights, rel=1e-4)
    # The gradient's norm is of all ranks.
    axes = {"pp", "fsdp", "tp", "expert_shard", "ep", "all ranks"}
    assert {axis for axis, _ in plan.traffic} == axes
    # It sends [1, T / tp, d] in bfloat16 for each microbatch.
    sent = plan.traffic["pp", "send"]
    assert (sent.calls, sent.bytes) == (4, 4 * 131072 // 8 * 2048 * 2)


def test_ranks_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UserError, match=r"--rank 4: .* 0 to 3"):
        plan_rank(load_config("tiny"), ranks=4, rank=4)


def test_layouts_that_do_not_work_are_refused() -> None:
    with pytest.raises(UserError, match=r"layout refused: .*Nearest"):
        plan_rank(load_config("tiny", ["parallel.tp=3"]), ranks=6, rank=0)
