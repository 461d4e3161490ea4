"""Every shipped recipe is planned; what cannot be planned is refused."""

import re
from functools import cache, partial

import pytest
from typer.testing import CliRunner

from launch.cli import app
from pretrain.config import load_config, phases_of, recipe_names
from pretrain.dry_run.plan import Plan, plan_rank
from pretrain.dry_run.step import Step
from pretrain.errors import UserError
from tests.apart import apart

# Recipe -> the ranks it is meant for, and the memory of one of them in GiB.
MEANT_FOR = {
    "demo": (2, 8),
    "tiny": (4, 8),
    "tiny-hybrid-moe": (4, 8),
    "qwen3-next-80b": (4096, 72),
    "length-extension": (2, 8),
    "length-extension-1b": (64, 72),
    "hybrid-1b-128k": (8, 72),
    # An H200 has 139.
    "hybrid-1b-1m": (1, 125),
    "million-cpu": (2, 8),
    "recall": (1, 8),
    "icl": (1, 8),
}
# A quarter of a minute and more.
SLOW = ("length-extension-1b", "million-cpu", "hybrid-1b-128k", "hybrid-1b-1m")


def plan_recipe(recipe: str) -> Plan:
    """Of its last phase, which has the longest sequences."""
    return plan_rank(phases_of(load_config(recipe))[-1].config, MEANT_FOR[recipe][0], rank=0)


@cache
def plan_apart(recipe: str) -> Plan:
    (plan,) = apart(plan_recipe, recipe)
    return plan


def test_every_shipped_recipe_is_planned() -> None:
    assert set(MEANT_FOR) == set(recipe_names())


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MEANT_FOR],
)
def test_a_shipped_recipe_fits(recipe: str) -> None:
    memory = plan_apart(recipe).memory
    kept = memory.weights + memory.optimizer
    assert kept + memory.activations < memory.peak < MEANT_FOR[recipe][1] * 2**30


def plan_of_segments(gradient: str, tells_all: bool) -> Plan:
    settings = ["model.layer_pattern=[linear, sliding, softmax]", "model.attention.window=16"]
    settings += ["model.n_layers=3"]
    settings += ["data.seq_len=640", "context.segments=10", f"context.gradient={gradient}"]
    settings += ["train.global_batch=1", "train.microbatch=1", "parallel.cp=2"]
    with pytest.MonkeyPatch.context() as patch:
        if tells_all:
            patch.setattr(Step, "telling_segments", lambda step: [step.segments])
        return plan_rank(load_config("tiny-hybrid-moe", settings), 2, rank=0)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["exact", "detach"])
def test_few_segments_tell_what_many_need(gradient: str) -> None:
    few, all_of_them = apart(partial(plan_of_segments, gradient), False, True)
    assert few.traffic == all_of_them.traffic
    assert few.memory.peak == pytest.approx(all_of_them.memory.peak, rel=0.02)
    assert few.memory.peak == sum(few.memory.parts.values())


def plan_of_offload(where: str) -> Plan:
    settings = ["model.n_layers=2", "model.layer_pattern=[softmax]", "parallel.recompute=full"]
    settings += ["data.seq_len=4096", "context.segments=8", f"parallel.offload={where}"]
    settings += ["train.global_batch=1", "train.microbatch=1"]
    return plan_rank(load_config("tiny-hybrid-moe", settings), 1, rank=0)


def test_what_segments_hand_on_waits_elsewhere_until_a_layer_computes_with_it() -> None:
    here, elsewhere = apart(plan_of_offload, "none", "host")
    attention = load_config("tiny-hybrid-moe").model.attention
    keys_and_values = 2 * 4096 * attention.n_kv_heads * attention.head_dim * 4
    # Of both layers, from all segments but the last.
    assert here.memory.peak - elsewhere.memory.peak >= 2 * keys_and_values * 7 / 8


def plan_sharded(ranks: int) -> Plan:
    """With weights that are larger than what a forward pass keeps."""
    settings = ["model.n_layers=1", "model.layer_pattern=[linear]", "parallel.recompute=full"]
    settings += ["model.vocab_size=65536", "model.d_model=512", f"train.global_batch={2 * ranks}"]
    return plan_rank(load_config("tiny-hybrid-moe", settings), ranks, rank=0)


def test_gathered_weights_are_no_activations() -> None:
    alone, sharded = apart(plan_sharded, 1, 8)
    assert sharded.memory.activations == alone.memory.activations > 0


def plan_update(on_gpus: bool) -> Plan:
    """Of a model whose weights need more memory than its few tokens do."""
    large = ["model.d_model=256", "model.d_ff=2048", "model.n_layers=8", "model.vocab_size=256"]
    few = ["data.seq_len=64", "train.microbatch=1", "train.global_batch=1"]
    return plan_rank(load_config("tiny", [*large, *few]), 1, rank=0, on_gpus=on_gpus)


def test_an_update_of_all_weights_at_once_is_planned_where_torch_does_so() -> None:
    on_gpus, on_cpus = apart(plan_update, True, False)
    # Weights, gradients, two moments, and the square root of one.
    assert on_gpus.memory.peak == pytest.approx(5 * on_gpus.memory.weights, rel=0.01)
    assert on_gpus.memory.parts["update"] == pytest.approx(on_gpus.memory.weights, rel=0.01)
    assert on_cpus.memory.peak < 4.7 * on_cpus.memory.weights


def test_each_phase_of_a_run_is_planned() -> None:
    second = "{from_step: 10, data.seq_len: 1024, train.global_batch: 4, parallel.cp: 2}"
    settings = ["train.global_batch=32", "train.microbatch=1", f"phases=[{second}]"]
    result = CliRunner().invoke(app, ["train", "tiny", "--dry-run", "--ranks", "4", *settings])
    assert result.exit_code == 0, result.output
    for text in (
        "8 microbatches of 1 x 256 tokens",
        "phase 2 from step 10: data.seq_len=1024",
        "dp_shard=2 cp=2",
        "2 microbatches of 1 x 1,024 tokens",
    ):
        assert text in result.output
    # The activations of a longer row, of which each rank has half.
    first, second = re.findall(r"activations +([\d.]+) MiB", result.output)
    assert 1.9 < float(second) / float(first) < 2.2


def test_a_large_model_is_spread_over_all_ranks() -> None:
    plan = plan_apart("qwen3-next-80b")
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
