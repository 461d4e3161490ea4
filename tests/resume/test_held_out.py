"""No evaluation on held-out text is lost or doubled, however a run is interrupted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.hold_out import hold_out
from launch.train import prepare
from pretrain.run_dir import RunDirectory
from tests.ranks import run_on_ranks
from tests.unit.pretrain.metrics.test_wandb_sink import values_of, wandb_records

SCRIPT = Path(__file__).with_name("held_out_case.py")
SETTINGS = (
    "train={steps: 8, global_batch: 2, log_every: 3}",
    "data.seq_len=64",
    "eval={every: 2, tokens: 1000}",
    "checkpoint.every=7",
    "wandb.mode=disabled",
)


# The weights of step 4 mean something else with the base of the steps after.
PHASES = (
    "phases=[{from_step: 4, data.seq_len: 128, train.global_batch: 1, train.microbatch: 1, "
    "model.attention.rope_base: 4.0e+2}]"
)


def rows(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def losses(run: RunDirectory) -> Mapping[int, Any]:
    return {row["train/step"]: row.get("eval/heldout_loss") for row in rows(run)}


def test_each_due_step_is_evaluated_once(shards: Path, tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    hold_out(shards, pages, share=0.2)

    def start(name: str) -> RunDirectory:
        return prepare("tiny", [f"data.shards={pages}", *SETTINGS], 1, tmp_path / name)

    whole = start("whole")
    run_on_ranks(1, SCRIPT, str(whole.root))
    expected = rows(whole)
    assert [row["train/step"] for row in expected] == [2, 3, 4, 6, 7, 8], "7 has a checkpoint"
    evaluated = losses(whole)
    assert [step for step, found in evaluated.items() if found] == [2, 4, 6, 8]
    assert evaluated[8]["pages"] < evaluated[2]["pages"]

    run = start("interrupted")
    # In the loop, and in an evaluation that the attempt before has left.
    for _ in range(2):
        run_on_ranks(1, SCRIPT, str(run.root), "stop", "evaluating")
        assert [row["train/step"] for row in rows(run)] == [2]
        assert "eval/heldout_loss" not in rows(run)[0], "who is asked to stop gives up"
    run_on_ranks(1, SCRIPT, str(run.root), "stop", "4")
    assert "eval/heldout_loss" not in rows(run)[-1], "who is asked to stop does not evaluate"
    with pytest.raises(AssertionError, match="rank 0 of 1 failed, killed by signal 9"):
        run_on_ranks(1, SCRIPT, str(run.root), "kill", "7")
    run_on_ranks(1, SCRIPT, str(run.root))
    assert losses(run) == evaluated
    assert len(rows(run)) == len(expected)


def test_wandb_gets_what_was_evaluated_late_without_the_rest_of_its_row(
    shards: Path, tmp_path: Path
) -> None:
    pages = tmp_path / "pages"
    hold_out(shards, pages, share=0.2)
    settings = [f"data.shards={pages}", *SETTINGS, "wandb.mode=offline"]
    run = prepare("tiny", settings, 1, tmp_path / "run")
    for stop_at in ("2", "4"):
        run_on_ranks(1, SCRIPT, str(run.root), "stop", stop_at)
    _, second = wandb_records(run)
    late, *later = [record["item"] for record in values_of(second, "history")]
    assert late["train/step"] == 2
    assert "eval/heldout_loss/pages" in late
    assert "train/loss" not in late
    assert [row["train/step"] for row in later] == [3, 4]


def test_what_a_stop_has_left_is_evaluated_with_the_settings_of_its_step(
    shards: Path, tmp_path: Path
) -> None:
    pages = tmp_path / "pages"
    hold_out(shards, pages, share=0.2)

    def start(name: str) -> RunDirectory:
        settings = [f"data.shards={pages}", *SETTINGS, "train.microbatch=1", PHASES]
        return prepare("tiny", settings, 1, tmp_path / name)

    whole, run = start("whole"), start("interrupted")
    run_on_ranks(1, SCRIPT, str(whole.root))
    # Where a phase ends, and where the run does.
    for step in (4, 8):
        run_on_ranks(1, SCRIPT, str(run.root), "stop", str(step))
        assert not losses(run)[step]
        assert not run.done.exists()
        assert json.loads(run.stopped.read_text())["step"] == step
    # An evaluation is all that is left.
    run_on_ranks(1, SCRIPT, str(run.root), "stop", "evaluating")
    assert not run.done.exists()
    run_on_ranks(1, SCRIPT, str(run.root))
    assert run.done.exists()
    assert losses(run) == losses(whole)
