"""What a dry run plans is what a real run on 4 ranks needs."""

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import load_config
from pretrain.dry_run.plan import Plan, plan_rank
from tests.apart import apart
from tests.ranks import run_on_ranks

SCRIPT = Path(__file__).with_name("dry_run_cases.py")
RANKS = 4
TWO_LAYERS = "model.n_layers=2 model.layer_pattern=[linear,softmax]"
CASES = {
    "dp": f"{TWO_LAYERS} train.global_batch=24",
    "hsdp": f"{TWO_LAYERS} parallel.dp_replicate=2 train.dtype=bfloat16 parallel.recompute=full",
    "tp": f"{TWO_LAYERS} parallel.tp=2 parallel.recompute=selective train.global_batch=16",
    "ep-tp": f"{TWO_LAYERS} parallel.ep=4 parallel.tp=2",
    "ep-tiles": f"{TWO_LAYERS} parallel.ep=2 parallel.feed_forward_tile=100",
    "ep-segments": "model.n_layers=2 model.layer_pattern=[linear] parallel.ep=2 context.segments=2",
    # 128 rows of a rank, which remember more than one of them needs to be computed.
    "lanes": "model.n_layers=2 model.layer_pattern=[linear,sliding] model.attention.window=64 "
    "data.seq_len=64 train.microbatch=8 train.global_batch=512 context.lane_rows=4",
    "cp": f"{TWO_LAYERS} parallel.cp=4 parallel.recompute=selective train.global_batch=4",
    "ulysses": f"{TWO_LAYERS} parallel.cp=2 parallel.ulysses=2 parallel.tp=2 train.global_batch=4",
    "pp-ep": f"{TWO_LAYERS} parallel.pp=2 parallel.ep=2 train.global_batch=24",
    "interleaved": "parallel.pp=2 parallel.pipeline.schedule=interleaved "
    "parallel.pipeline.stages_per_rank=2 parallel.recompute=full train.global_batch=16",
}
# The ranks of a pipeline differ.
PLANNED = [(name, 0) for name in CASES] + [("pp-ep", 3), ("interleaved", 3)]


@pytest.fixture(scope="module")
def measured(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("dry-run")
    cases = [f"{name}:{overrides}" for name, overrides in CASES.items()]
    run_on_ranks(RANKS, SCRIPT, str(shards), str(folder), *cases)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def plan_case(case: tuple[str, int]) -> Plan:
    name, rank = case
    return plan_rank(load_config("tiny-hybrid-moe", CASES[name].split()), RANKS, rank)


@pytest.fixture(scope="module")
def planned() -> dict[tuple[str, int], Plan]:
    return dict(zip(PLANNED, apart(plan_case, *PLANNED), strict=True))


@pytest.mark.parametrize(("name", "rank"), PLANNED)
def test_a_plan_is_what_a_rank_needs(
    name: str, rank: int, measured: dict[str, Any], planned: dict[tuple[str, int], Plan]
) -> None:
    real, plan = measured[f"{name}-{rank}"], planned[name, rank]
    assert plan.parameters == real["parameters"]
    assert plan.memory.weights == 4 * real["parameters"]
    assert plan.memory.gradients == real["gradients"]
    assert plan.memory.optimizer == real["optimizer"]
    assert plan.memory.gathered == real["gathered"]
    assert plan.memory.activations == pytest.approx(real["activations"], rel=0.03)
    assert plan.memory.peak == pytest.approx(real["peak"], rel=0.05)


@pytest.mark.parametrize(("name", "rank"), PLANNED)
def test_a_plan_counts_the_collectives_of_a_step(
    name: str, rank: int, measured: dict[str, Any], planned: dict[tuple[str, int], Plan]
) -> None:
    real = {(axis, kind): numbers for axis, kind, *numbers in measured[f"{name}-{rank}"]["traffic"]}
    traffic = {
        key: [count.calls, count.bytes] for key, count in planned[name, rank].traffic.items()
    }
    # Besides what is planned, a step counts its tokens and adds up its metrics.
    assert calls_of(real, "all-reduce") == calls_of(traffic, "all-reduce") + 2
    for numbers in (real, traffic):
        for key in [key for key in numbers if key[1] == "all-reduce" and key[0] != "dp_replicate"]:
            del numbers[key]
    # Routing is planned as it is in expectation.
    if ("ep", "all-to-all") in traffic:
        calls, sent = traffic.pop(("ep", "all-to-all"))
        real_calls, real_sent = real.pop(("ep", "all-to-all"))
        assert calls == real_calls
        assert sent == pytest.approx(real_sent, rel=0.05)
    assert traffic == real


@pytest.mark.parametrize("name", ["dp", "hsdp", "tp", "ep-tp", "pp-ep", "interleaved"])
def test_bytes_are_those_that_ranks_count(name: str, measured: dict[str, Any]) -> None:
    real = measured[f"{name}-0"]
    seen = {
        (axis, kind): sent
        for axis, kind, _, sent in real["traffic"]
        if sent and (kind != "all-reduce" or axis == "dp_replicate")
    }
    counted = {
        (axis, kind): sent
        for axis, kind, sent in real["sent"]
        if sent and (kind != "all-reduce" or axis == "dp_replicate")
    }
    assert counted
    assert counted == seen


def calls_of(traffic: dict[tuple[str, str], list[int]], kind: str) -> int:
    return sum(calls for (_, of_kind), (calls, _) in traffic.items() if of_kind == kind)
