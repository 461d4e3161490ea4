"""No evaluation on held-out text is lost or doubled, however a run is interrupted."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.hold_out import hold_out
from launch.train import prepare
from pretrain.run_dir import RunDirectory
from tests.ranks import run_on_ranks

SCRIPT = Path(__file__).with_name("held_out_case.py")
SETTINGS = (
    "train={steps: 8, global_batch: 2, log_every: 3}",
    "data.seq_len=64",
    "eval={every: 2, tokens: 1000}",
    "checkpoint.every=7",
    "wandb.mode=disabled",
)


def rows(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def test_each_due_step_is_evaluated_once(shards: Path, tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    hold_out(shards, pages, share=0.2)

    def start(name: str) -> RunDirectory:
        return prepare("tiny", [f"data.shards={pages}", *SETTINGS], 1, tmp_path / name)

    whole = start("whole")
    run_on_ranks(1, SCRIPT, str(whole.root))
    expected = rows(whole)
    assert [row["train/step"] for row in expected] == [2, 3, 4, 6, 7, 8], "7 has a checkpoint"
    evaluated = {row["train/step"]: row.get("eval/heldout_loss") for row in expected}
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
    with pytest.raises(AssertionError, match="rank 0 of 1 failed"):
        run_on_ranks(1, SCRIPT, str(run.root), "kill", "7")
    run_on_ranks(1, SCRIPT, str(run.root))
    found = rows(run)
    assert {row["train/step"]: row.get("eval/heldout_loss") for row in found} == evaluated
    assert len(found) == len(expected)
