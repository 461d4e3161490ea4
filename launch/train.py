"""`farspan train`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.local import StopSignals
from launch.report import write_report_of
from pretrain.config import Config, load_config
from pretrain.engines.choice import check_engines, check_installed
from pretrain.errors import TrainingError, UserError
from pretrain.run_dir import RunDirectory


def prepare(
    recipe: str,
    overrides: Sequence[str],
    nproc: int,
    run_dir: Path | None,
    allowed: Sequence[str] = (),
) -> RunDirectory:
    """Check a recipe against `nproc` ranks and its data, and write its run directory.

    Args:
        allowed: settings that may differ from those of the run that is there.
    """
    from launch.prepare import prepare_run

    config = load_config(recipe, overrides)
    layouts = dict.fromkeys(map(str, check_engines(config, nproc)))
    check_installed(config)
    run = prepare_run(config, directory_of(config, recipe, run_dir), allowed)
    print(
        f"{recipe} on {nproc} ranks ({', then '.join(layouts)}), run directory {run.root}",
        flush=True,
    )
    return run


def directory_of(config: Config, recipe: str, run_dir: Path | None) -> Path:
    """Where a run of a recipe lies, unless `run_dir` says so."""
    return run_dir or Path(config.run.dir or Path("runs") / Path(recipe).stem)


def train_locally(run: RunDirectory, nproc: int, max_restarts: int, plain: bool = False) -> int:
    """Train a prepared run on `nproc` ranks of this machine and write its report.

    Args:
        plain: show no panel on a terminal.

    Returns:
        The exit code of the run.

    Raises:
        UserError: another launcher holds the run directory.
        TrainingError: the run directory is gone.
    """
    try:
        return _train_locally(run, nproc, max_restarts, plain)
    except OSError as error:
        if run.is_cause_of(error):
            raise TrainingError(run.explain(error)) from None
        raise


def _train_locally(run: RunDirectory, nproc: int, max_restarts: int, plain: bool) -> int:
    with StopSignals() as stop, run.launching():
        # torch's agent takes seconds to import, and a request to stop may come meanwhile.
        from launch.agent import run_ranks

        command = [sys.executable, "-m", "launch.rank", str(run.root), str(os.getpid())]
        code, attempt = run_ranks(run, command, nproc, max_restarts, stop, plain)
        if run.current_attempt() == attempt and run.metrics.exists():
            try_to_report(run)
    return code


def try_to_report(run: RunDirectory) -> None:
    """Write the report of a run, or say why it cannot be written."""
    # What became of the run does not depend on it.
    try:
        print(f"report: {write_report_of([run.root])}")
    except Exception as error:
        is_told = isinstance(error, OSError | UserError | TrainingError)
        why = error if is_told else repr(error)
        print(f"warning: no report: {why}; `farspan report {run.root}`", file=sys.stderr)
