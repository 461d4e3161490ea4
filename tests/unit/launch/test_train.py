"""Which options go together, and what a run leaves behind when it ends."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.train import try_to_report
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory


def test_a_report_that_cannot_be_made_is_told_and_changes_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path)
    run.config.write_text(load_config("tiny", []).to_yaml())
    run.evaluations.mkdir()
    run.evaluation("long", 9).write_text("{}")
    try_to_report(run)
    told = capsys.readouterr()
    assert "warning: no report: KeyError('request')" in told.err
    assert told.out == ""


@pytest.mark.parametrize("instead", ["--dry-run", "--explain-memory"])
@pytest.mark.parametrize(
    "options",
    [
        ["--run-dir", "runs/x"],
        # As by default, and still of no use.
        ["--max-restarts", "3"],
        ["--allow-change", "optim.lr"],
        ["--plain"],
        ["--prepare-only"],
    ],
)
def test_what_makes_no_run_refuses_options_of_one(instead: str, options: list[str]) -> None:
    done = CliRunner().invoke(app, ["train", "tiny", instead, *options])
    assert isinstance(done.exception, UserError)
    told = f"{options[0]}: {instead} makes no run; leave out one or the other"
    assert str(done.exception) == told


def test_all_options_that_a_dry_run_has_no_use_for_are_named_at_once() -> None:
    given = ["--plain", "--explain-memory", "--run-dir", "runs/x"]
    done = CliRunner().invoke(app, ["train", "tiny", "--dry-run", *given])
    told = (
        "--run-dir, --plain, --explain-memory: --dry-run makes no run; leave out one or the other"
    )
    assert str(done.exception) == told


def test_a_dry_run_plans_for_one_number_of_ranks() -> None:
    options = ["--dry-run", "--ranks", "4", "--nproc", "1"]
    done = CliRunner().invoke(app, ["train", "tiny", *options])
    told = "--nproc: a dry run plans for --ranks; leave out one or the other"
    assert str(done.exception) == told
