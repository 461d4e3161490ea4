"""What memory is for, predicted without any and measured in real steps, is the same."""

from typing import Any

import pytest

from launch.explain_memory import _measure
from pretrain.config import load_config
from pretrain.dry_run.plan import Memory, plan_rank
from tests.apart import apart
from tests.e2e.test_cli import farspan

SIZES = ("data.seq_len=512", "train.microbatch=1", "model.n_layers=2", "schedule.name=constant")
LANES = (
    "train.global_batch=16",
    "context.lane_rows=2",
    "context.segments=2",
    "model.layer_pattern=[linear, sliding]",
    "model.attention.window=256",
)
EVERY_TOOL = (
    "train.global_batch=2",
    "parallel.ep=2",
    "parallel.recompute=[full, selective]",
    "parallel.feed_forward_tile=128",
    "optim.clip=null",
    "optim.in_backward=true",
    "optim.state_dtype=bfloat16",
    "train.dtype=bfloat16",
)
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ("train.global_batch=2",)),
    "every tool": (2, EVERY_TOOL),
    "segments": (1, ("train.global_batch=1", "context.segments=4", "parallel.recompute=full")),
    "lanes": (1, LANES),
}


def predict(name: str) -> Memory:
    ranks, overrides = CASES[name]
    config = load_config("tiny-hybrid-moe", [*SIZES, *overrides])
    return plan_rank(config, ranks, 0, on_gpus=False).memory


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_prediction_is_what_is_measured(name: str) -> None:
    ranks, overrides = CASES[name]
    measured: dict[str, Any] = _measure(
        load_config("tiny-hybrid-moe", [*SIZES, *overrides]), ranks
    )[0]
    (predicted,) = apart(predict, name)
    assert predicted.peak == pytest.approx(measured["peak"], rel=0.05)
    assert sum(predicted.parts.values()) == predicted.peak
    assert sum(measured["parts"].values()) == measured["peak"]
    for part in ("weights", "optimizer state"):
        assert predicted.parts[part] == measured["parts"][part] > 0, part
    for part in predicted.parts | measured["parts"]:
        difference = abs(predicted.parts.get(part, 0) - measured["parts"].get(part, 0))
        assert difference <= 0.05 * predicted.peak, part
    assert predicted.kept == pytest.approx(measured["kept"], rel=0.03)
    assert measured["process"] > measured["before"] > 0


def test_ranks_that_do_not_exist_are_refused() -> None:
    done = farspan("train", "tiny", "--explain-memory", "--rank", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--rank 1: the 1 ranks are numbered from 0 to 0" in done.stderr


def test_a_step_that_has_no_room_is_told_in_words() -> None:
    offload = ("parallel.offload=disk", "parallel.offload_dir=/dev/null/below")
    done = farspan("train", "tiny", "--explain-memory", "parallel.recompute=full", *offload)
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: parallel.offload_dir = /dev/null/below" in done.stderr
    assert "Traceback" not in done.stderr
