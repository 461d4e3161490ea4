"""What rows remember beyond their step is saved, and goes on wherever the run does."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.audit import audit_run
from launch.train import prepare
from pretrain.config import read_run_config
from pretrain.ledger import Trained
from pretrain.lineage import read_lineage
from pretrain.replay_plan import plan_replay
from pretrain.run_dir import RunDirectory
from tests.ranks import run_on_ranks

SCRIPT = Path(__file__).with_name("phases_case.py")
SETTINGS = (
    "train.steps=9",
    "data.seq_len=64",
    "train.global_batch=4",
    "train.microbatch=1",
    "context.lane_rows=4",
    "model.layer_pattern=[linear, sliding, softmax, linear]",
    "model.attention.window=32",
    "checkpoint.every=3",
    "checkpoint.keep=9",
    "wandb.mode=disabled",
)


# What sliding layers keep is too many keys, within lanes; too few, where lanes end; and turned by
# another angle.
CHANGES = (
    "phases=[{from_step: 3, model.attention.window: 16}, {from_step: 4, model.attention.window: 24}"
    ", {from_step: 6, model.attention.rope_base: 5e4}]"
)


def start(
    directory: Path, shards: Path, *overrides: str, allowed: Sequence[str] = ()
) -> RunDirectory:
    settings = [f"data.shards={shards}", *SETTINGS, *overrides]
    return prepare("tiny-hybrid-moe", settings, 2, directory, allowed)


def trained(run: RunDirectory) -> list[tuple[Any, ...]]:
    """What went into the weights, bit for bit."""
    return [
        (b.step, b.first_token, b.packed, b.loss, b.grad_norm)
        for _, b in read_lineage(run.ledger).batches()
        if isinstance(b, Trained)
    ]


def losses(run: RunDirectory) -> list[float]:
    return [step[3] for step in trained(run)]


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = start(tmp_path_factory.mktemp("lanes") / "run", shards)
    run_on_ranks(2, SCRIPT, str(run.root))
    return run


@pytest.fixture(scope="module")
def killed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """In the middle of the second lanes; its checkpoint is of the last but one row of the first."""
    run = start(tmp_path_factory.mktemp("lanes") / "run", shards)
    with pytest.raises(AssertionError):
        run_on_ranks(2, SCRIPT, str(run.root), "saving", "6")
    return run


def test_rows_that_forget_the_ones_before_have_other_losses(
    whole: RunDirectory, shards: Path, tmp_path: Path
) -> None:
    forgetful = start(tmp_path / "run", shards)
    run_on_ranks(2, SCRIPT, str(forgetful.root), "forgetting")
    assert [step[2] for step in trained(forgetful)] == [step[2] for step in trained(whole)]
    differs = np.array(losses(forgetful)) != np.array(losses(whole))
    # The first rows of lanes have nothing to forget.
    assert differs.tolist() == [False] + [True] * 8


@pytest.mark.slow
def test_heads_that_lie_elsewhere_let_rows_begin_anew(
    whole: RunDirectory, killed: RunDirectory, shards: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(killed.root, copy)
    other = start(copy, shards, "parallel.tp=2")
    run_on_ranks(2, SCRIPT, str(other.root))
    assert losses(other)[:3] == losses(whole)[:3]
    assert losses(other)[3] != pytest.approx(losses(whole)[3], rel=1e-5)
    assert not audit_run(other).problems


def test_layers_that_see_a_token_at_a_time_go_on_within_lanes(shards: Path, tmp_path: Path) -> None:
    narrow = ("model.attention.window=1", "model.linear.conv_width=1", "checkpoint.every=1")
    start(tmp_path / "stopped", shards, *narrow, "train.steps=2")
    run_on_ranks(2, SCRIPT, str(tmp_path / "stopped"))
    whole, stopped = (
        start(tmp_path / name, shards, *narrow, "train.steps=3") for name in ("whole", "stopped")
    )
    for run in (whole, stopped):
        run_on_ranks(2, SCRIPT, str(run.root))
    assert trained(stopped) == trained(whole)


def test_keys_of_another_attention_are_forgotten(
    killed: RunDirectory, shards: Path, tmp_path: Path
) -> None:
    changing = start(tmp_path / "changing", shards, CHANGES)
    run_on_ranks(2, SCRIPT, str(changing.root))
    forgetful = start(tmp_path / "forgetful", shards, CHANGES)
    run_on_ranks(2, SCRIPT, str(forgetful.root), "forgetting", "4", "7")
    assert trained(changing) == trained(forgetful)
    assert not audit_run(changing).problems

    copy, window = tmp_path / "resumed", "model.attention.window"
    shutil.copytree(killed.root, copy)
    resumed = start(copy, shards, f"{window}=16", "train.steps=4", allowed=[window])
    run_on_ranks(2, SCRIPT, str(resumed.root))
    assert losses(resumed) == losses(changing)[:4]


def test_a_kill_within_lanes_changes_nothing_on_any_layout(
    whole: RunDirectory, killed: RunDirectory, shards: Path
) -> None:
    copy = killed.root.with_name("split")
    shutil.copytree(killed.root, copy)
    run_on_ranks(2, SCRIPT, str(killed.root))
    assert trained(killed) == trained(whole)
    assert not audit_run(killed).problems

    other = start(copy, shards, "parallel.cp=2")
    run_on_ranks(2, SCRIPT, str(other.root))
    np.testing.assert_allclose(losses(other), losses(whole), rtol=1e-5)
    assert not audit_run(other).problems


def test_a_step_within_lanes_is_replayed_from_before_what_has_been_skipped_since(
    shards: Path, tmp_path: Path
) -> None:
    run = start(tmp_path / "run", shards, "train.steps=3", "checkpoint.every=1")
    run_on_ranks(2, SCRIPT, str(run.root))
    for step in (2, 3):
        shutil.rmtree(run.checkpoints / f"step-{step:08d}")
    # The second attempt skips batch 1: its step 2 is batch 2, which was step 3 before.
    run_on_ranks(2, SCRIPT.with_name("guard_case.py"), str(run.root), "1", "")
    plan = plan_replay(read_run_config(run, 1), run, attempt=1, first_token=2 * 4 * 64)
    assert plan.kept == [1, 2, 3]
    assert (plan.target.step, plan.checkpoint) == (3, 1)
