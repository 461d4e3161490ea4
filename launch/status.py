"""`farspan launch status`: where runs are, as a table or live."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch.data_state import DataState, is_data_run, read_data_state
from launch.data_status import line_of, render_data_runs
from launch.durations import duration_text
from launch.failures import Failure
from launch.run_state import RunState, read_state
from launch.slurm.client import Slurm, SlurmError
from launch.slurm.job import read_job
from launch.slurm.profile import Profile
from launch.slurm.requeue import let_back
from launch.starters import jobs_of, slurm_here
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory

RUNS = Path("runs")
WATCH_S = 2.0
FAILURES_SHOWN = 5
# Also where standard output is no terminal.
TABLE_WIDTH = 120

State = RunState | DataState


def print_status(runs: Sequence[Path], watch: bool, as_json: bool) -> None:
    """
    Args:
        runs: run directories, and folders of data runs; none: those under ./runs, and of this
            user's jobs.
        watch: show them anew every two seconds, until all have ended.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, TABLE_WIDTH)
    if watch:
        with suppress(KeyboardInterrupt):
            _watch(console, runs, slurm_here())
        return
    told: set[Path] = set()
    try:
        states = read_states(runs, slurm_here(), told)
    except SlurmError as error:
        _warn_without(error)
        states = read_states(runs, None, told)
    if as_json:
        print(json.dumps([to_json(state) for state in states], indent=1))
    else:
        console.print(render(states))


def read_states(runs: Sequence[Path], slurm: Slurm | None, told: set[Path]) -> list[State]:
    """The states of runs, or of all that are found but those that cannot be read.

    Args:
        told: of which it was said that they are left out; more are added.

    Raises:
        UserError: there are none, or one that was named cannot be read.
    """
    if runs:
        return [_read(run.resolve(), slurm) for run in runs]
    found = list(dict.fromkeys((*_runs_here(), *_runs_of_jobs(slurm))))
    if not found:
        raise UserError(
            f"no runs under {RUNS.resolve()}"
            + (", and no jobs of yours that train one" if slurm else "")
            + ": name a run directory, as in `farspan launch status RUN`"
        )
    states = []
    for run in found:
        try:
            states.append(_read(run, slurm))
        except UserError as error:
            # A folder of another program, or of another version: not worth all the others.
            if run not in told:
                print(f"warning: {_name(run)} is left out: {error}", file=sys.stderr, flush=True)
            told.add(run)
    if not states:
        raise UserError(f"none of the {len(found)} runs that were found can be read")
    return states


def _warn_without(error: SlurmError) -> None:
    print(
        f"warning: Slurm does not answer ({error}); this is what the run directories say alone",
        file=sys.stderr,
        flush=True,
    )


def _read(run: Path, slurm: Slurm | None) -> State:
    directory = RunDirectory(run)
    if not directory.config.exists() and is_data_run(run):
        return read_data_state(run, slurm)
    state = read_state(directory, slurm)
    if slurm and state.state == "queued":
        # While a job waits nobody else is there to do so.
        submitted = read_job(directory)
        profile = submitted.profile if submitted else Profile()
        back = let_back(directory, slurm, profile, jobs_of(directory, slurm))
        for job, nodes in back.items():
            print(f"job {job} may run on {', '.join(nodes)} again", file=sys.stderr, flush=True)
    return state


def to_json(state: State) -> dict[str, Any]:
    """Everything that is known of a run."""
    if isinstance(state, DataState):
        return state.to_json()
    fields = {name: getattr(state, name) for name in RunState.__dataclass_fields__}
    failures, excluded = map(asdict, state.failures), map(asdict, state.excluded)
    return fields | {
        "run": str(state.run.root),
        "excluded": list(excluded),
        "failures": list(failures),
    }


def render(states: Sequence[State]) -> RenderableType:
    """One run as a list of what is known of it; several as a row each, data runs by themselves."""
    trained = [state for state in states if isinstance(state, RunState)]
    of_data = [state for state in states if isinstance(state, DataState)]
    if not of_data:
        return _render_runs(trained)
    data_runs = render_data_runs([_name(state.out) for state in of_data], of_data)
    return Group(_render_runs(trained), "", data_runs) if trained else data_runs


def _render_runs(states: Sequence[RunState]) -> RenderableType:
    if len(states) == 1:
        return _details(states[0])
    table = Table(box=None, pad_edge=False)
    for name in ("run", "state", "attempt", "step", "tokens/s", "last checkpoint", "ETA", ""):
        table.add_column(name, overflow="fold")
    for state in states:
        facts = _facts(state)
        cells = [fact for name, fact in facts.items() if name not in ("why", "where")]
        excluded = ", ".join(entry.node for entry in state.excluded)
        notes = [facts["why"], facts["where"], f"without {excluded}" if excluded else ""]
        table.add_row(Text(_name(state.run.root)), *map(Text, (*cells, _joined(notes))))
    return table


def _details(state: RunState) -> RenderableType:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("run", Text(str(state.run.root)))
    for name, fact in _facts(state).items():
        if fact:
            table.add_row(name, Text(fact))
    for entry in state.excluded:
        until = datetime.fromisoformat(entry.until).astimezone()
        table.add_row("excluded", Text(f"{entry.node} until {until:%Y-%m-%d %H:%M}: {entry.why}"))
    if not state.failures:
        return table
    failures = Table(box=None, pad_edge=False)
    for name in ("attempt", "died after step", "when", "of"):
        failures.add_column(name, overflow="fold")
    for failure in state.failures[-FAILURES_SHOWN:]:
        failures.add_row(*map(Text, _failure_cells(failure)))
    return Group(table, "", failures)


def _facts(state: RunState) -> dict[str, str]:
    speed = "" if state.tokens_per_s is None else f"{state.tokens_per_s:,.0f}"
    checkpoint = ""
    if state.checkpoint is not None:
        checkpoint = f"step {state.checkpoint:,}"
        if state.checkpoint_age_s is not None:
            checkpoint += f", {duration_text(state.checkpoint_age_s)} ago"
    return {
        "state": state.state,
        "attempt": f"{state.attempt}" if state.attempt else "",
        "step": f"{state.step:,} of {state.steps:,}",
        "tokens/s": speed,
        "last checkpoint": checkpoint,
        "ETA": "" if state.eta_s is None else f"in {duration_text(state.eta_s)}",
        "why": state.detail,
        "where": state.where,
    }


def _failure_cells(failure: Failure) -> tuple[str, str, str, str]:
    return f"{failure.attempt}", f"{failure.step:,}", failure.time, str(failure)


def _joined(notes: Sequence[str]) -> str:
    return "; ".join(filter(None, notes))


def _watch(console: Console, runs: Sequence[Path], slurm: Slurm | None) -> None:
    """Show the runs until all have ended; where nobody watches, print what has changed."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for states in _until_ended(runs, slurm):
                live.update(render(states), refresh=True)
        return
    printed: dict[Path, str] = {}
    for states in _until_ended(runs, slurm):
        for state in states:
            folder = state.out if isinstance(state, DataState) else state.run.root
            line = _line(state)
            if printed.get(folder) != line:
                printed[folder] = line
                print(line, flush=True)


def _line(state: State) -> str:
    """Without what changes all the time."""
    if isinstance(state, DataState):
        return line_of(_name(state.out), state)
    facts = _facts(state)
    words = [_name(state.run.root), facts["state"], f"attempt {state.attempt}"]
    words += [f"step {facts['step']}", *([facts["where"]] if facts["where"] else [])]
    return "  ".join(words)


def _until_ended(runs: Sequence[Path], slurm: Slurm | None) -> Iterator[list[State]]:
    states: list[State] = []
    told: set[Path] = set()
    has_answered = False
    while True:
        try:
            states = read_states(runs, slurm, told)
            has_answered = True
        except SlurmError as error:
            # A controller that is busy or restarted comes back; one that never was there does not.
            if not has_answered:
                if not states:
                    _warn_without(error)
                states = read_states(runs, None, told)
        yield states
        if not any(state.is_live for state in states):
            return
        time.sleep(WATCH_S)


def _runs_here() -> list[Path]:
    runs = [path.parent for path in RUNS.glob("*/config.yaml")]
    data_runs = [path for path in RUNS.glob("*") if path.is_dir() and is_data_run(path)]
    return sorted(run.resolve() for run in {*runs, *data_runs})


def _runs_of_jobs(slurm: Slurm | None) -> list[Path]:
    """Where this user's jobs train: a job works in its run directory.

    Those of data runs work where they were submitted, so that their folders have to be named.
    """
    if slurm is None:
        return []
    folders = slurm.call("squeue", "--noheader", "--me", "--format=%Z").splitlines()
    return sorted({Path(folder).resolve() for folder in folders if _is_run(folder)})


def _is_run(folder: str) -> bool:
    run = RunDirectory(Path(folder))
    return run.job.is_file() and run.config.is_file()


def _name(run: Path) -> str:
    with suppress(ValueError):
        return str(run.relative_to(Path.cwd()))
    return str(run)
