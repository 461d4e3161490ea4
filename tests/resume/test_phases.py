"""A run in phases is what separate runs would be, one after the other."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.audit import audit_run
from launch.train import prepare
from pretrain.ledger import RolledBack, Trained, read_ledger
from pretrain.lineage import read_lineage
from pretrain.run_dir import RunDirectory
from tests.ranks import run_on_ranks

SCRIPT = Path(__file__).with_name("phases_case.py")
SETTINGS = (
    "train.steps=9",
    "data.seq_len=64",
    "train.global_batch=8",
    "parallel.ep=2",
    "checkpoint.every=100",
    "checkpoint.keep=9",
    "schedule={name: cosine, warmup_steps: 1}",
    "wandb.mode=disabled",
)
SECOND = (
    "data.seq_len=128",
    "train.global_batch=4",
    "model.attention.rope_base=1e5",
    "optim.lr=5e-4",
)
# The ranks share sequences instead of batches.
THIRD = (
    "data.seq_len=256",
    "train.global_batch=1",
    "train.microbatch=1",
    "model.attention.yarn.factor=4",
    "model.attention.yarn.original_length=64",
    "parallel.cp=2",
)
# Also in the third phase, which has half as many tokens in a step.
TOKENS = [0, 3 * 512, 6 * 512]


def sources(shards: Path) -> str:
    of = [f"{{path: {shards}, name: {name}}}" for name in ("short", "long")]
    return f"data.shards=[{', '.join(of)}]"


def phases() -> str:
    def written(settings: Sequence[str]) -> str:
        return ", ".join(setting.replace("=", ": ") for setting in settings)

    second = f"{{from_step: 3, weights: {{long: 3}}, {written(SECOND)}}}"
    return f"phases=[{second}, {{from_tokens: {TOKENS[2]}, {written(THIRD)}}}]"


def start(directory: Path, shards: Path, *overrides: str) -> RunDirectory:
    settings = [sources(shards), *SETTINGS, phases(), *overrides]
    return prepare("tiny-hybrid-moe", settings, 2, directory)


def trained(run: RunDirectory) -> list[tuple[Any, ...]]:
    """What went into the weights, bit for bit."""
    return [
        (b.step, b.first_token, b.rows, b.seq_len, b.packed, b.loss, b.grad_norm)
        for _, b in read_lineage(run.ledger).batches()
        if isinstance(b, Trained)
    ]


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = start(tmp_path_factory.mktemp("phases") / "run", shards)
    run_on_ranks(2, SCRIPT, str(run.root))
    return run


def test_phases_are_separate_runs_chained_by_hand(
    whole: RunDirectory, shards: Path, tmp_path: Path
) -> None:
    by_hand = [f"data.curriculum=[{{tokens: {TOKENS[1]}, weights: {{long: 3}}}}]"]
    of_rate = ["schedule.from_step=3", "schedule.to_step=null"]
    links = [
        (["train.steps=3", "schedule.to_step=3"], []),
        (["train.steps=6", *SECOND, "schedule.from_step=3", "schedule.to_step=9"], SECOND),
        (["train.steps=9", *SECOND, *THIRD, *of_rate], THIRD),
    ]
    asked = ["schedule.from_step", "schedule.to_step"]
    for number, (overrides, changed) in enumerate(links):
        names = [setting.partition("=")[0] for setting in changed] + asked[: 2 * (number == 1)]
        names += ["schedule.to_step"] * (number == 2)
        allowed = [n for n in names if n not in ("parallel.cp", "train.microbatch")]
        settings = [sources(shards), *SETTINGS, *by_hand, *overrides]
        run = prepare("tiny-hybrid-moe", settings, 2, tmp_path / "run", allowed)
        run_on_ranks(2, SCRIPT, str(run.root))

    assert trained(run) == trained(whole)


def test_phases_are_seen_in_metrics_ledger_and_audit(whole: RunDirectory) -> None:
    rows = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
    assert [row["train/seq_len"] for row in rows] == [64] * 3 + [128] * 3 + [256] * 3
    assert [row["train/lr"] for row in rows[:4]] == pytest.approx([1e-3, 1e-3, 5.5e-4, 5e-4])
    assert [row[2:4] for row in trained(whole)] == [(8, 64)] * 3 + [(4, 128)] * 3 + [(1, 256)] * 3
    audit = audit_run(whole)
    assert not audit.problems
    assert (audit.attempts, audit.steps, audit.trained_tokens) == (1, 9, 6 * 512 + 3 * 256)


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        ("switching", 3),
        pytest.param("saving", 6, marks=pytest.mark.slow),
        pytest.param("damaging", 6, marks=pytest.mark.slow),
    ],
)
def test_an_end_at_a_switch_changes_nothing(
    whole: RunDirectory, shards: Path, tmp_path: Path, moment: str, step: int
) -> None:
    run = start(tmp_path / "run", shards)
    with pytest.raises(AssertionError):
        run_on_ranks(2, SCRIPT, str(run.root), moment, str(step))
    run_on_ranks(2, SCRIPT, str(run.root))

    assert trained(run) == trained(whole)
    audit = audit_run(run)
    assert not audit.problems
    assert audit.undone_by_restarts.steps == (0 if moment == "switching" else 3)


@pytest.mark.slow
def test_a_rollback_may_lead_back_to_an_earlier_phase(shards: Path, tmp_path: Path) -> None:
    overrides = ["train.steps=12", "guard.history=2", "guard.window=8", "checkpoint.every=2"]
    longer = "phases=[{from_step: 6, data.seq_len: 128, train.global_batch: 4}]"
    settings = [f"data.shards={shards}", *SETTINGS, longer, *overrides]
    run = prepare("tiny-hybrid-moe", settings, 2, tmp_path / "run")
    # Each goes back twice as far as the one before.
    run_on_ranks(2, SCRIPT, str(run.root), "spikes", "8,9,11")

    back = [record for record in read_ledger(run.ledger) if isinstance(record, RolledBack)]
    assert [record.to_step for record in back][-1] < 6
    assert [row[3] for row in trained(run)] == [64] * 6 + [128] * 6
    assert [row[0] for row in trained(run)] == list(range(1, 13))
    assert not audit_run(run).problems
    assert run.done.exists()
