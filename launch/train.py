"""`farspan train` and `farspan report`."""

import json
from collections.abc import Sequence
from pathlib import Path

from launch.local import run_ranks
from pretrain.config import load_config, read_run_config
from pretrain.layouts import resolve_layout
from pretrain.run_dir import RunDirectory


def prepare(
    recipe: str, overrides: Sequence[str], nproc: int, run_dir: Path | None
) -> RunDirectory:
    """Check a recipe against `nproc` ranks and its data, and write its run directory."""
    from launch.prepare import prepare_run

    config = load_config(recipe, overrides)
    layout = resolve_layout(config, nproc)
    run = prepare_run(config, run_dir or Path(config.run.dir or Path("runs") / Path(recipe).stem))
    print(f"{recipe} on {nproc} ranks ({layout}), run directory {run.root}", flush=True)
    return run


def train_locally(run: RunDirectory, nproc: int) -> int:
    """Train a prepared run on `nproc` ranks of this machine and write its report.

    Returns:
        The exit code of the run.
    """
    code = run_ranks(run, nproc)
    if run.metrics.exists():
        print(f"report: {write_run_report(run.root)}")
    return code


def write_run_report(directory: Path) -> Path:
    """Write the report of a run, with what is known of its data."""
    from pretrain.metrics.report import write_report

    run = RunDirectory(directory)
    read_run_config(run)
    return write_report(run, json.loads(run.data.read_text()))
