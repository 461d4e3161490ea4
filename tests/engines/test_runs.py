"""Whole runs under other engines, through the command line, against runs under ours."""

import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from launch.local import rank_pids
from launch.train import prepare
from pretrain.ledger import AttemptBegun, RollbackBegun, RolledBack, Skipped, Trained, read_ledger
from pretrain.run_dir import RunDirectory
from tests.ranks import ROOT, run_on_ranks
from tests.resume.test_kill import Run, outcome

pytestmark = pytest.mark.oracle

SCRIPT = Path(__file__).with_name("guard_case.py")
TOLERANCE = 1e-4
PAGE = (ROOT / "docs/engines.md").read_text()
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]
LAYOUTS = {
    "native": ("train.engine=native",),
    "megatron": ("train.engine=megatron", "parallel.tp=2", "parallel.ep=2"),
    "deepspeed": ("train.engine=deepspeed", "parallel.zero.persistence_threshold=0"),
}
OTHERS = ("megatron", "deepspeed")


class Killed(NamedTuple):
    """What a run had logged when a rank was killed, and its steps before its engine began."""

    curve: list[tuple]
    first: int


class WentOn(NamedTuple):
    """The run of the page, and how it was killed under each engine but the native one."""

    run: Run
    killed: dict[str, Killed]


class Page(Run):
    """A command of the page, on another run directory."""

    def __init__(self, directory: Path, command: list[str]) -> None:
        super().__init__(Path(), directory)
        self.command[3:] = [*command[1:], "--run-dir", str(directory)]

    @property
    def engine(self) -> str:
        named = [word for word in self.command if word.startswith("train.engine=")]
        return named[0].partition("=")[2] if named else "native"


def train(run: RunDirectory, *spoilt: str) -> None:
    run_on_ranks(2, SCRIPT, str(run.root), *spoilt)


@pytest.fixture(scope="module")
def went_on(tmp_path_factory: pytest.TempPathFactory) -> WentOn:
    """Other engines are killed after a checkpoint each."""
    directory, killed = tmp_path_factory.mktemp("engines") / "run", {}
    for command in COMMANDS:
        run = Page(directory, command)
        if run.engine in OTHERS:
            first = run.logged_steps()[-1]
            saving = ("checkpoint.every=2", "checkpoint.asynchronous=false", "--max-restarts", "0")
            process = run.start_and_reach(first + 3, *saving)
            os.kill(rank_pids(run.run_dir)[1], signal.SIGKILL)
            code, output = outcome(process)
            assert code == 1, output
            killed[run.engine] = Killed(run.curve(), first)
        run.finish()
    return WentOn(run, killed)


def test_a_run_goes_from_engine_to_engine_with_the_losses_of_one(
    went_on: WentOn, tmp_path: Path
) -> None:
    directory = went_on.run.directory
    engines = [Page(directory, command).engine for command in COMMANDS]
    assert engines == ["native", *OTHERS, "native"]
    native = Page(tmp_path / "run", COMMANDS[-1])
    settings = [word for word in COMMANDS[-1] if "=" in word]
    train(prepare("tiny-hybrid-moe", settings, 2, native.directory))
    for key in ("train/loss", "train/aux_loss", "train/tokens"):
        ours, theirs = ([row[key] for row in run.rows()] for run in (native, went_on.run))
        assert theirs == pytest.approx(ours, rel=TOLERANCE), key


@pytest.mark.parametrize("engine", OTHERS)
def test_a_rank_killed_after_a_checkpoint_changes_no_bit(engine: str, went_on: WentOn) -> None:
    run, (curve, first) = went_on.run, went_on.killed[engine]
    assert run.curve()[: len(curve)] == curve
    began = [x.step for x in read_ledger(run.run_dir.ledger) if isinstance(x, AttemptBegun)]
    # From a checkpoint of its own, before steps that it had taken.
    (resumed,) = [step for step in began if first < step < len(curve)]
    assert (resumed - first) % 2 == 0


def test_the_ledger_of_such_a_run_is_whole(went_on: WentOn) -> None:
    run = went_on.run
    audit = run.audit()
    assert (audit["attempts"], audit["steps"]) == (len(COMMANDS) + len(OTHERS), 24)
    assert audit["trained_tokens"] == run.rows()[-1]["train/tokens"]
    assert audit["undone_by_restarts"]["steps"] >= len(OTHERS)


def guarded(engine: str, directory: Path, shards: Path) -> RunDirectory:
    """A run that met a NaN in batch 2, and a spike in batch 9."""
    settings = (f"data.shards={shards}", "data.seq_len=64", "train.steps=12", "checkpoint.every=4")
    guard = ("guard.history=6", "guard.window=8", "schedule.name=constant", *LAYOUTS[engine])
    run = prepare("tiny-hybrid-moe", [*settings, *guard], 2, directory)
    train(run, "2", "9")
    return run


@pytest.fixture(scope="module")
def met_by_native(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return guarded("native", tmp_path_factory.mktemp("native") / "run", shards)


def events(run: RunDirectory) -> list[tuple[Any, ...]]:
    """What the guard did, in order."""
    kinds = (Skipped, RollbackBegun, RolledBack)
    found = []
    for record in read_ledger(run.ledger):
        if isinstance(record, kinds):
            fields = ("step", "first_token", "from_step", "to_step", "skip_from", "skip_to")
            found.append((type(record).__name__, *(getattr(record, f, None) for f in fields)))
    return found


def trained(run: RunDirectory) -> list[float]:
    return [record.loss for record in read_ledger(run.ledger) if isinstance(record, Trained)]


@pytest.mark.parametrize("engine", OTHERS)
def test_a_bad_batch_is_skipped_and_a_spike_undone_as_natively(
    engine: str, met_by_native: RunDirectory, shards: Path, tmp_path: Path
) -> None:
    run = guarded(engine, tmp_path / "run", shards)
    found = events(run)
    names = [name for name, *_ in found]
    assert names == ["Skipped", "Skipped", "RollbackBegun", "RolledBack", "Skipped"]
    assert found == events(met_by_native)
    assert trained(run) == pytest.approx(trained(met_by_native), rel=TOLERANCE)


def in_phases(engine: str, directory: Path, shards: Path) -> RunDirectory:
    """A run whose engine is built anew for the second half of it, in the same process."""
    settings = ("data.seq_len=64", "train.steps=4", "schedule.name=constant", *LAYOUTS[engine])
    phases = "phases=[{from_step: 2, data.seq_len: 128}]"
    run = prepare("tiny-hybrid-moe", [f"data.shards={shards}", *settings, phases], 2, directory)
    train(run)
    return run


@pytest.fixture(scope="module")
def native_phases(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return in_phases("native", tmp_path_factory.mktemp("phases") / "run", shards)


@pytest.mark.parametrize("engine", OTHERS)
def test_phases_have_the_losses_of_native_ones(
    engine: str, native_phases: RunDirectory, shards: Path, tmp_path: Path
) -> None:
    run = in_phases(engine, tmp_path / "run", shards)
    assert trained(run) == pytest.approx(trained(native_phases), rel=TOLERANCE)
