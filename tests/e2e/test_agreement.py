"""Ranks that read different configurations, or plan different batches, do not train."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from launch.local import free_port, rank_environment
from launch.prepare import prepare_run
from pretrain.config import load_config
from tests.ranks import ROOT, TIMEOUT_S, run_on_ranks

PLANNING_CASE = Path(__file__).with_name("planning_case.py")


def test_a_rank_with_another_configuration_is_named_with_the_setting(
    shards: Path, tmp_path: Path
) -> None:
    config = load_config("tiny-hybrid-moe", [f"data.shards={shards}"])
    run = prepare_run(config, tmp_path / "run-0")
    shutil.copytree(run.root, tmp_path / "run-1")
    text = run.config.read_text()
    (tmp_path / "run-1" / run.config.name).write_text(text.replace("lr: 0.001", "lr: 0.002"))

    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "pretrain.train", str(tmp_path / f"run-{rank}")],
            env=os.environ | rank_environment(rank, 2, port),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=TIMEOUT_S)
        assert rank.returncode == 2, errors
        assert "rank 1: optim.lr = 0.002, not 0.001" in errors
        assert "Traceback" not in errors
    assert not list(tmp_path.glob("run-*/metrics.jsonl"))


def test_ranks_that_plan_different_batches_find_out_before_the_weights_change(
    shards: Path, tmp_path: Path
) -> None:
    run_on_ranks(2, PLANNING_CASE, str(shards), str(tmp_path))
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert "the plan of the global batch of step 2 differs" in result["message"]
        assert "rank 1: tokens before it = " in result["message"]
        assert (result["step"], result["unchanged"]) == (1, True)
