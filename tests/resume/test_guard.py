"""A run that meets bad batches skips them, and ends as if they had never been in the stream."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.train import prepare
from pretrain.ledger import AttemptBegun, RollbackBegun, RolledBack, Skipped, Trained, read_ledger
from pretrain.replay_plan import tries
from pretrain.run_dir import RunDirectory
from tests.e2e.test_cli import farspan
from tests.ranks import run_on_ranks
from tests.unit.pretrain.metrics.test_wandb_sink import values_of, wandb_records

SCRIPT = Path(__file__).with_name("guard_case.py")
STEPS = 24
SETTINGS = (
    f"train.steps={STEPS}",
    "data.seq_len=64",
    "parallel.ep=2",
    "checkpoint.every=4",
    "checkpoint.keep=9",
    "schedule.name=constant",
    "guard.history=6",
    "guard.window=8",
)
BATCH = 8 * 64


def start(directory: Path, shards: Path, *overrides: str) -> RunDirectory:
    settings = [f"data.shards={shards}", *SETTINGS, *overrides]
    return prepare("tiny-hybrid-moe", settings, 2, directory)


def records(run: RunDirectory) -> list[Any]:
    return list(read_ledger(run.ledger))


def curve(run: RunDirectory) -> list[tuple[int, float, float]]:
    rows = map(json.loads, run.metrics.read_text().splitlines())
    return [(row["train/step"], row["train/loss"], row["train/grad_norm"]) for row in rows]


def batches(records: list[Any], kind: type) -> list[int]:
    return [record.first_token // BATCH for record in records if isinstance(record, kind)]


@pytest.fixture(scope="module")
def met(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that met a NaN in batch 2, and spikes in batches 13, 14 and 15."""
    run = start(tmp_path_factory.mktemp("guard") / "run", shards)
    run_on_ranks(2, SCRIPT, str(run.root), "2", "13,14,15")
    return run


def test_a_batch_without_a_finite_gradient_is_skipped_on_every_rank(met: RunDirectory) -> None:
    skipped = next(record for record in records(met) if isinstance(record, Skipped))
    assert (skipped.step, skipped.first_token // BATCH) == (3, 2)
    assert skipped.reason == "the loss is nan"


def test_a_spike_goes_back_to_the_checkpoint_before_and_a_second_one_further(
    met: RunDirectory,
) -> None:
    # Batch 2 took no step: batch 13 would have been step 13.
    back = [record for record in records(met) if isinstance(record, RolledBack)]
    assert [(record.from_step, record.to_step) for record in back] == [(13, 12), (13, 8)]
    begun = [record for record in records(met) if isinstance(record, RollbackBegun)]
    assert [(r.skip_from // BATCH, r.skip_to // BATCH) for r in begun] == [(13, 14), (13, 16)]
    assert all("the gradient norm is" in record.reason for record in begun)
    assert all("sigmas above the median of the last 8 steps" in record.reason for record in begun)


def test_what_counts_in_the_end_is_every_batch_but_the_bad_ones(met: RunDirectory) -> None:
    trained = batches(records(met), Trained)
    assert set(trained) == {*range(STEPS + 4)} - {2, 13, 14, 15}
    audited = farspan("audit", str(met.root), "--json")
    assert audited.returncode == 0, audited.stdout + audited.stderr
    assert [step for step, *_ in curve(met)] == list(range(1, STEPS + 1))
    # 2 and 13; 13 again, and 14; then 13, 14 and 15, which was skipped without being met.
    rows = [json.loads(line) for line in met.metrics.read_text().splitlines()]
    assert (rows[-1]["guard/skipped"], rows[-1]["guard/rollbacks"]) == (7, 2)


def test_each_of_them_is_an_alert_at_wandb(met: RunDirectory) -> None:
    (fragment,) = wandb_records(met)
    alerts = [(alert["title"], alert["text"]) for alert in values_of(fragment, "alert")]
    assert [title for title, _ in alerts] == ["batch skipped", "rolled back", "rolled back"]
    assert alerts[0][1] == "step 3: the loss is nan; batch skipped"
    assert alerts[1][1].endswith("rolled back to step 12, 1 batch will be skipped")


def test_it_ends_as_a_run_that_never_met_them(
    met: RunDirectory, shards: Path, tmp_path: Path
) -> None:
    """Which it is, once the ledger says what to skip."""
    other = start(tmp_path / "run", shards)
    shutil.copyfile(met.ledger, other.ledger)
    run_on_ranks(2, SCRIPT, str(other.root), "2", "13,14,15")
    assert curve(other) == curve(met)
    new = records(other)[len(records(met)) :]
    assert batches(new, Skipped) == [2, 13, 14, 15]
    assert not any(isinstance(record, RolledBack) for record in new)


def test_a_run_that_is_killed_as_it_goes_back_goes_back_all_the_same(
    met: RunDirectory, shards: Path, tmp_path: Path
) -> None:
    run = start(tmp_path / "run", shards)
    with pytest.raises(AssertionError, match=r"rank [01] of 2 failed"):
        run_on_ranks(2, SCRIPT, str(run.root), "2", "13,14,15", "dies in rollback 2")
    assert isinstance(records(run)[-1], RollbackBegun)
    run_on_ranks(2, SCRIPT, str(run.root), "2", "13,14,15")
    assert curve(run) == curve(met)
    began = [record.step for record in records(run) if isinstance(record, AttemptBegun)]
    assert began == [0, 8]


def test_a_run_that_is_killed_as_it_goes_back_from_its_first_step_begins_again(
    shards: Path, tmp_path: Path
) -> None:
    free = ("optim.clip=null", "optim.in_backward=true", "train.microbatch=4", "train.steps=1")
    run = start(tmp_path / "run", shards, *free)
    with pytest.raises(AssertionError, match=r"rank [01] of 2 failed"):
        run_on_ranks(2, SCRIPT, str(run.root), "0,1", "", "dies in rollback 2")
    assert isinstance(records(run)[-1], RollbackBegun)
    run_on_ranks(2, SCRIPT, str(run.root), "0,1", "")
    assert batches(records(run), Trained) == [3]


def replayed(met: RunDirectory, folder: Path, record: Any) -> dict[str, Any]:
    result = folder / "replayed.json"
    which = str(record.attempt), str(record.first_token), str(result)
    run_on_ranks(2, SCRIPT, str(met.root), "2", "13,14,15", *which)
    return json.loads(result.read_text())


def test_a_step_without_a_finite_loss_can_be_replayed_and_its_layer_is_named(
    met: RunDirectory, tmp_path: Path
) -> None:
    before = met.ledger.read_bytes(), sorted(met.root.rglob("*"))
    (record,) = tries(records(met), 3)[:1]
    found = replayed(met, tmp_path, record)
    assert found["differs"] == []
    assert found["not_finite"].keys() == {"1"}
    assert found["not_finite"]["1"].startswith("the output of layers.2.moe (")
    assert (met.ledger.read_bytes(), sorted(met.root.rglob("*"))) == before


def test_a_gradient_that_a_replay_has_used_up_in_the_backward_pass_is_named(
    shards: Path, tmp_path: Path
) -> None:
    free = ("optim.clip=null", "optim.in_backward=true", "train.microbatch=4", "train.steps=2")
    run, result = start(tmp_path / "run", shards, *free), tmp_path / "replayed.json"
    script = SCRIPT.with_name("gradient_case.py")
    run_on_ranks(2, script, str(run.root), "1")
    (met, _) = tries(records(run), 2)
    which = str(met.attempt), str(met.first_token), str(result)
    run_on_ranks(2, script, str(run.root), "1", *which)
    found = json.loads(result.read_text())
    assert found["differs"] == []
    assert found["not_finite"].keys() == {"0", "1"}
    for told in found["not_finite"].values():
        assert told.startswith("every output is finite, the gradient of layers.2.moe.shared_expert")


@pytest.mark.slow
def test_a_step_that_was_rolled_back_can_be_replayed_from_before_what_is_skipped_since(
    met: RunDirectory, tmp_path: Path
) -> None:
    first, *_ = tries(records(met), 13)
    found = replayed(met, tmp_path, first)
    assert (found["differs"], found["not_finite"], found["checkpoint"]) == ([], {}, 12)
    assert found["grad_norm"] == first.grad_norm > 100


@pytest.mark.slow
def test_the_command_says_what_is_not_as_in_the_ledger(met: RunDirectory) -> None:
    done = farspan("replay", str(met.root), "--step", "13")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "* try 3: attempt 1, tokens 8,192 to 8,704" in done.stdout
    assert "bitwise as in the ledger" in done.stdout
    # Nobody spoils it now.
    done = farspan("replay", str(met.root), "--step", "13", "--try", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "gradient norm of the batch at token 6656: " in done.stdout
    assert "step 99" in farspan("replay", str(met.root), "--step", "99").stderr


@pytest.mark.slow
def test_a_run_that_updates_in_the_backward_pass_goes_back_where_another_would_skip(
    shards: Path, tmp_path: Path
) -> None:
    free = ("optim.clip=null", "train.microbatch=4", "train.steps=13")
    skips = start(tmp_path / "skips", shards, *free)
    goes_back = start(tmp_path / "goes back", shards, *free, "optim.in_backward=true")
    for run in (skips, goes_back):
        # One is met before there is a checkpoint.
        run_on_ranks(2, SCRIPT, str(run.root), "2,12", "")
    back = [record for record in records(goes_back) if isinstance(record, RolledBack)]
    assert [(record.from_step, record.to_step) for record in back] == [(3, 0), (12, 8)]
    assert batches(records(skips), Skipped) == [2, 12]
    for name in ("loss", "lr", "tokens"):
        ours, others = (
            [json.loads(line)[f"train/{name}"] for line in run.metrics.read_text().splitlines()]
            for run in (goes_back, skips)
        )
        assert ours == others, name


def test_a_run_whose_batches_are_all_bad_ends_with_a_diagnosis(
    shards: Path, tmp_path: Path
) -> None:
    run = start(tmp_path / "run", shards, "guard.max_skips=2")
    with pytest.raises(AssertionError, match=r"the loss is nan at step 6.*max_skips"):
        run_on_ranks(2, SCRIPT, str(run.root), "5,6,7", "")
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000004"]
