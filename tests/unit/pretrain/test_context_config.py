"""Which rows can be cut into segments."""

import pytest

from pretrain.config import load_config
from pretrain.errors import UserError

ROW = ["data.seq_len=1024", "context.segments=4"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["context.segments=3"], ["341.333 tokens", "chunks of 64", "nearest that works is 2"]),
        (["context.segments=32"], ["32 tokens", "nearest that works is 16"]),
        (["data.seq_len=100", "context.segments=2"], ["make data.seq_len a multiple of 64"]),
        (
            ["model.layer_pattern=[linear, sliding]", "model.attention.window=300"],
            ["window = 300", "256 tokens", "take 2 segments, or a smaller window"],
        ),
        (
            ["model.layer_pattern=[linear, sliding]", "model.attention.window=2000"],
            ["window = 2000", "256 tokens: take a smaller window"],
        ),
        (["parallel.pp=2"], ["parallel.pp = 2", "cp, ep or dp_shard"]),
        (["parallel.cp=2", "parallel.ulysses=2"], ["parallel.ulysses=1"]),
        (["optim.clip=null", "optim.in_backward=true"], ["optim.in_backward = true"]),
        (["model.moe.balance=sequence"], ["balance = sequence", "batch or bias"]),
        (["model.moe.capacity_factor=1.5"], ["capacity_factor = 1.5", "null"]),
        (["context.gradient=some"], ["context.gradient = 'some'", "exact"]),
        (["context.lane_rows=0"], ["context.lane_rows = 0", "greater than or equal to 1"]),
        (["context.lane_rows=2", "context.carry=false"], ["lane_rows = 2", "carry=true"]),
        (["context.lane_rows=2", "model.layer_pattern=[softmax]"], ["linear or sliding layers"]),
        (
            ["context.segments=1", "context.lane_rows=2", "data.seq_len=100"],
            ["context.lane_rows = 2", "make data.seq_len a multiple of 64"],
        ),
        (
            ["context.segments=1", "context.lane_rows=2", "parallel.pp=2"],
            ["context.lane_rows = 2 with parallel.pp = 2"],
        ),
    ],
)
def test_segments_that_cannot_be_are_refused_with_what_works(
    overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError) as refusal:
        load_config("tiny-hybrid-moe", [*ROW, *overrides])
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(("gradient", "reach"), [("exact", 4), ("detach", 1), ("3", 3)])
def test_the_gradient_reaches_as_far_as_asked(gradient: str, reach: int) -> None:
    config = load_config("tiny-hybrid-moe", [*ROW, f"context.gradient={gradient}"])
    assert config.context.reach == reach
