"""What an engine cannot do is refused with the field, the reason and what it can."""

import pytest

from pretrain.config import load_config
from pretrain.engines.limits import check_megatron, note_of_megatron
from pretrain.errors import UserError
from pretrain.layouts import resolve_layout


def check(*overrides: str, ranks: int = 4) -> None:
    config = load_config("tiny-hybrid-moe", [*overrides])
    check_megatron(config, resolve_layout(config, ranks))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.tp=2", "parallel.ep=4"],
        ["parallel.pp=2", "parallel.pipeline.schedule=interleaved"],
        ["parallel.cp=4", "parallel.recompute=full", "train.dtype=bfloat16"],
        ["model.moe.balance=sequence", "model.moe.aux_loss=0"],
    ],
)
def test_what_it_can_do_passes(overrides: list[str]) -> None:
    check(*overrides)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.moe.balance=bias"], "model.moe.balance = bias"),
        (["model.moe.balance=sequence"], "model.moe.balance = sequence"),
        (["model.moe.capacity_factor=1.5"], "null drops nothing"),
        (["parallel.tp=2"], "set parallel.ep"),
        (["parallel.tp=4", "parallel.ep=4"], "model.attention.n_kv_heads = 2"),
        (
            ["parallel.tp=4", "parallel.ep=4", "model.linear.n_key_heads=2"],
            "model.linear.n_key_heads = 2",
        ),
        (["parallel.pp=2", "parallel.pipeline.schedule=zbv"], "schedule = zbv"),
        (
            [
                "parallel.pp=2",
                "parallel.pipeline.schedule=interleaved",
                "train.global_batch=6",
                "train.microbatch=1",
            ],
            "interleaved with 3 microbatches on each rank: it takes a multiple of parallel.pp = 2",
        ),
        (["parallel.pp=4", "model.n_layers=6"], "4 stages do not divide model.n_layers = 6"),
        (["parallel.pp=2", "parallel.pipeline.layers_per_stage=[1,3]"], "layers_per_stage"),
        (["parallel.cp=2", "parallel.ulysses=2"], "parallel.ulysses = 2"),
        (["parallel.cp=2", "data.seq_len=254"], "2 x parallel.cp = 4"),
        (["context.segments=2"], "context.segments"),
        (["parallel.recompute=selective"], "parallel.recompute = selective"),
        (["parallel.recompute=full", "parallel.offload=host"], "parallel.offload"),
        (["parallel.feed_forward_tile=64"], "parallel.feed_forward_tile"),
        (["parallel.ep=2", "parallel.dispatcher=deepep"], "parallel.dispatcher = deepep"),
        (["optim.state_dtype=bfloat16"], "optim.state_dtype"),
        (["eval.every=10"], "farspan eval RUN"),
    ],
)
def test_what_it_cannot_do_is_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError) as refused:
        check(*overrides)
    assert told in str(refused.value)


def test_all_is_told_at_once() -> None:
    with pytest.raises(UserError) as refused:
        check("parallel.cp=2", "parallel.ulysses=2", "model.moe.balance=bias")
    assert str(refused.value).count("\n- ") == 2


@pytest.mark.parametrize(("settings", "tokens"), [([], 1024), (["parallel.cp=2"], None)])
def test_logits_that_are_not_computed_in_chunks_are_told(
    settings: list[str], tokens: int | None
) -> None:
    rows = ["data.seq_len=512", "train.microbatch=2", "train.loss_chunk=512"]
    config = load_config("tiny-hybrid-moe", [*rows, *settings])
    note = note_of_megatron(config, resolve_layout(config, 4))
    assert note is None if tokens is None else f"all {tokens} tokens" in str(note)
