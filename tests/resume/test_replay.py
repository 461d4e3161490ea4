"""A step is replayed from where it can be, or it is said why not, and never more is claimed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from launch.shared import run_shared
from pretrain.checkpoint.store import checkpoint_in
from pretrain.checkpoint.target import Target
from pretrain.config import read_run_config
from pretrain.errors import UserError
from pretrain.replay_plan import ReplayPlan, plan_replay, read_outcomes, tries
from pretrain.run_dir import RunDirectory
from tests.e2e.test_cli import farspan, refusal, succeed
from tests.ranks import ROOT, TIMEOUT_S

STEPS = 6
BATCH = 8 * 64


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run of two attempts on two ranks, the second with another learning rate from step 4."""
    directory = tmp_path_factory.mktemp("replay") / "run"
    command = ("train", "tiny-hybrid-moe", "--run-dir", str(directory), "--nproc", "2")
    settings = (
        f"data.shards={shards}",
        "data.seq_len=64",
        "schedule.name=constant",
        "checkpoint.every=2",
        "checkpoint.keep=9",
    )
    succeed(*command, *settings, "train.steps=4")
    other = ("optim.lr=0.002", "--allow-change", "optim.lr")
    succeed(*command, *settings, f"train.steps={STEPS}", *other)
    return RunDirectory(directory)


@pytest.fixture
def run(trained: RunDirectory, tmp_path: Path) -> RunDirectory:
    """A copy of it, to take things away from."""
    shutil.copytree(trained.root, tmp_path / "run", ignore=shutil.ignore_patterns("wandb"))
    for path in (tmp_path / "run").rglob("config.yaml"):
        tree = yaml.safe_load(path.read_text())
        tree["checkpoint"]["dir"] = None
        path.write_text(yaml.safe_dump(tree))
    return RunDirectory(tmp_path / "run")


def remove(run: RunDirectory, *steps: int) -> None:
    for step in steps:
        checkpoint_in(Target(str(run.checkpoints)), step).remove()


def damage(run: RunDirectory, step: int, pattern: str) -> None:
    (path, *_) = sorted((run.checkpoints / f"step-{step:08d}").glob(pattern))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def plan_of(run: RunDirectory, step: int) -> ReplayPlan:
    batch = tries(read_outcomes(run), step)[-1]
    config = read_run_config(run, batch.attempt)
    return plan_replay(config, run, batch.attempt, batch.first_token)


def numerics(run: RunDirectory, attempt: int, **values: str) -> None:
    """Record these in place of what the attempt has computed with."""
    path = run.ranks_of(attempt)
    recorded = json.loads(path.read_text())
    path.write_text(json.dumps({name: recorded[name] for name in ("ranks", "layout")} | values))


def test_more_steps_than_are_allowed_are_refused_before_any_rank_is_started(
    run: RunDirectory,
) -> None:
    remove(run, 2)
    told = refusal("replay", str(run.root), "--step", "4", "--max-steps-again", "3")
    assert "step 4 can be replayed from the beginning of the run only: 4 steps" in told
    for hint in ("of step 4, 6", "checkpoint.keep_every", "--max-steps-again 4"):
        assert hint in told
    plan = plan_of(run, 4)
    plan.check(plan.checkpoint, 4)
    with pytest.raises(UserError, match="from the beginning of the run only"):
        plan.check(plan.checkpoint, 3)


def test_the_newest_checkpoint_that_can_be_read_is_planned_with(run: RunDirectory) -> None:
    assert plan_of(run, 4).checkpoint == 2
    damage(run, 2, "manifest.json")
    plan = plan_of(run, 4)
    assert plan.checkpoint == 0
    assert ["step 2 is damaged" in warning for warning in plan.warnings] == [True]


def test_what_may_make_a_difference_is_told(run: RunDirectory) -> None:
    now = {"torch": "2.13", "device": "cpu"}
    assert {"version of torch", "device", "kernels"} < json.loads(
        run.ranks_of(2).read_text()
    ).keys()
    numerics(run, 2)
    plan = plan_of(run, 6)
    (unknown,) = plan.caveats(4, now)
    assert "attempt 2 has not recorded its torch, device; now: 2.13, cpu" in unknown
    numerics(run, 2, torch="2.11", device="cpu")
    other_torch, other_attempt = plan_of(run, 6).caveats(2, now)
    assert other_torch == "attempt 2 computed with another torch: 2.11; now 2.13"
    assert "steps 3 to 4 were trained by attempt 1" in other_attempt
    assert "optim.lr 0.001 (now 0.002)" in other_attempt
    numerics(run, 1, torch="2.13", device="cpu")
    assert plan_of(run, 4).caveats(0, now) == []


def test_batches_of_another_size_are_not_trained_again_as_if_they_were_the_same(
    run: RunDirectory,
) -> None:
    plan = plan_of(run, 6)
    other = [batch for batch in plan.before if batch.step != 4]
    plan.before[:] = [*other, type(plan.before[0])(1, 4, 3 * BATCH, 8, 32, 1.0, 1.0, b"")]
    plan.check(4, 99)
    with pytest.raises(UserError, match="attempt 1 trained step 4 with 256 tokens where attempt 2"):
        plan.check(2, 99)


def test_more_ranks_than_the_machine_has_room_for_are_refused(run: RunDirectory) -> None:
    ranks = json.loads(run.ranks_of(2).read_text())
    run.ranks_of(2).write_text(json.dumps(ranks | {"ranks": 4096}))
    told = refusal("replay", str(run.root), "--step", "6")
    assert "attempt 2 had 4096 ranks, and this machine has" in told
    assert f"-m pretrain.replay {run.root} 2 {5 * BATCH}" in told
    assert "torchrun" in told
    assert "srun" in told


def test_a_step_of_another_engine_is_refused_before_any_rank_is_started(run: RunDirectory) -> None:
    for path in run.root.rglob("config.yaml"):
        tree = yaml.safe_load(path.read_text())
        tree["train"]["engine"] = "megatron"
        path.write_text(yaml.safe_dump(tree))
    told = "train.engine = megatron: a replay knows the native engine alone"
    assert told in refusal("replay", str(run.root), "--step", "6")
    with pytest.raises(UserError, match=told):
        plan_of(run, 6)


def test_a_step_is_replayed_from_before_a_damaged_checkpoint(run: RunDirectory) -> None:
    damage(run, 4, "*-rank-00001.safetensors")
    done = farspan("replay", str(run.root), "--step", "5")
    assert "the checkpoint of step 4 is damaged" in done.stderr
    assert "training 3 steps again, from the checkpoint of step 2" in done.stderr
    # Attempt 2 trains the steps of attempt 1 again, with its own learning rate.
    assert done.returncode == 1, done.stdout + done.stderr
    assert "not bitwise as in the ledger" in done.stdout
    assert "steps 3 to 4 were trained by attempt 1" in done.stdout


@pytest.mark.slow
def test_nothing_is_called_the_same_that_was_not_compared(run: RunDirectory) -> None:
    said = succeed("replay", str(run.root), "--step", "4")
    assert "ledger: loss and gradient norm of step 4, and of the step before it" in said
    said = succeed("replay", str(run.root), "--step", "5")
    assert "of step 5; no step before it was trained again" in said
    # The last that there is, and damaged only where it is loaded.
    remove(run, 4)
    damage(run, 2, "*-rank-00000.safetensors")
    done = farspan("replay", str(run.root), "--step", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training 4 steps again, from the beginning of the run" in done.stderr
    told = refusal("replay", str(run.root), "--step", "4", "--max-steps-again", "3")
    assert "from the beginning of the run only" in told


def torchrun(nproc: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(nproc), "-m", "pretrain.replay", *arguments),
        ],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_a_step_is_replayed_under_torchrun(trained: RunDirectory) -> None:
    before = sorted(trained.root.rglob("*"))
    done = torchrun(2, str(trained.root), "2", str(5 * BATCH))
    assert done.returncode == 0, done.stdout + done.stderr
    replayed: dict[str, Any] = json.loads(done.stdout)
    assert (replayed["checkpoint"], replayed["compared"], replayed["differs"]) == (4, 1, [])
    assert "training 2 steps again, from the checkpoint of step 4" in done.stderr
    assert sorted(trained.root.rglob("*")) == before


@pytest.mark.slow
def test_another_number_of_ranks_and_another_batch_are_refused_under_torchrun(
    trained: RunDirectory,
) -> None:
    done = torchrun(1, str(trained.root), "2", str(5 * BATCH))
    assert done.returncode != 0
    assert "error: attempt 2 had 2 ranks, and the replay was started with 1" in done.stderr
    done = torchrun(2, str(trained.root), "2", "7")
    assert done.returncode != 0
    assert "has no batch of attempt 2 that begins at token 7" in done.stderr
    assert '"loss"' not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGKILL, "error: rank 1 of 2 was killed by signal 9"),
        (signal.SIGSTOP, "does not answer (stopped, or cut off)"),
    ],
)
def test_a_rank_that_is_killed_or_hangs_is_named(
    number: signal.Signals, told: str, run: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    remove(run, 2)
    tree = yaml.safe_load(run.config_of(1).read_text())
    # Longer than a busy machine keeps a rank that is well.
    tree["train"]["hang_timeout_s"] = 30
    run.config_of(1).write_text(yaml.safe_dump(tree))
    case = (str(int(number)), "3", str(run.root), "1", str(3 * BATCH))
    with pytest.raises(typer.Exit) as ended:
        run_shared("tests.resume.replay_case", case, 2)
    assert ended.value.exit_code == 1
    *_, last = capfd.readouterr().err.splitlines()
    assert last.startswith("error: rank 1 ")
    assert told in last
