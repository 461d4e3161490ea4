"""What DeepSpeed cannot do is refused without it."""

import pytest

from pretrain.config import load_config
from pretrain.engines.zero_limits import check_deepspeed
from pretrain.errors import UserError
from pretrain.layouts import resolve_layout

SOFTMAX = "model.layer_pattern=[softmax,sliding]"


def check(*overrides: str) -> None:
    config = load_config("tiny-hybrid-moe", [*overrides])
    check_deepspeed(config, resolve_layout(config, 4))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.cp=4", "model.moe.balance=sequence", "model.moe.capacity_factor=1.5"],
        [SOFTMAX, "parallel.cp=2", "parallel.ulysses=2", "model.moe.balance=bias"],
        ["parallel.zero.persistence_threshold=0"],
        ["parallel.recompute=selective", "parallel.feed_forward_tile=64", "train.dtype=bfloat16"],
    ],
)
def test_what_it_can_do_passes(overrides: list[str]) -> None:
    check(*overrides)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["parallel.pp=2"], "parallel.pp = 2"),
        (["parallel.tp=2"], "parallel.tp = 2"),
        (["parallel.ep=2"], "parallel.ep = 2"),
        (["parallel.dp_replicate=2"], "parallel.dp_replicate = 2"),
        (["parallel.cp=4", "parallel.ulysses=2"], "4 DeepSpeed's Ulysses"),
        (["parallel.cp=2", "parallel.ulysses=2"], "linear layers with parallel.ulysses = 2"),
        ([SOFTMAX, "parallel.cp=4", "parallel.ulysses=4"], "model.attention.n_kv_heads = 2"),
        (
            [SOFTMAX, "parallel.cp=2", "parallel.ulysses=2", "model.moe.balance=sequence"],
            "model.moe.balance = sequence",
        ),
        (
            [SOFTMAX, "parallel.cp=2", "parallel.ulysses=2", "model.moe.capacity_factor=1.5"],
            "model.moe.capacity_factor = 1.5",
        ),
        (["context.segments=2"], "context.segments"),
        (["parallel.recompute=full", "parallel.offload=host"], "parallel.offload = host"),
        (["optim.state_dtype=bfloat16"], "optim.state_dtype"),
        (["parallel.dispatcher=deepep"], "parallel.dispatcher = deepep"),
        (["eval.every=10"], "eval.every = 10"),
        (
            ["parallel.zero.stage=2", "parallel.zero.offload_parameters=true"],
            "parallel.zero.offload_parameters with parallel.zero.stage = 2",
        ),
        (
            ["parallel.zero.stage=1", "parallel.zero.persistence_threshold=0"],
            "parallel.zero.persistence_threshold with parallel.zero.stage = 1",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError) as refused:
        check(*overrides)
    assert told in str(refused.value)


def test_all_is_told_at_once() -> None:
    with pytest.raises(UserError) as refused:
        check("parallel.tp=2", "parallel.ep=2", "eval.every=10")
    assert str(refused.value).count("\n- ") == 3
