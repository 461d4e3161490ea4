"""Where a run is: from what lies in its directory, and what its launcher or Slurm says."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal

from launch.cancelled import read_cancelled
from launch.durations import duration_text
from launch.failures import Failure, read_failure
from launch.slurm.client import JobInfo, Slurm
from launch.slurm.excludes import Excluded, excluded_now
from launch.starters import (
    job_of_newest_attempt,
    jobs_of,
    launcher_of,
    live_ranks,
    newest_jobs,
)
from launch.tails import last_lines
from parallel.heartbeat import HEARTBEATS
from pretrain.config import phases_of, read_run_config
from pretrain.curriculum import tokens_until
from pretrain.run_dir import RunDirectory

# prepared: no attempt yet. queued: Slurm has a job that waits. ending: its ranks have outlived what
# started them. lost: it ended without a word, such as when its launcher was killed.
State = Literal[
    "prepared",
    "queued",
    "running",
    "cancelling",
    "ending",
    "stopped",
    "cancelled",
    "failed",
    "lost",
    "done",
]
LIVE: Sequence[State] = ("queued", "running", "cancelling", "ending")
# Steps over which speed is measured.
RECENT_STEPS = 20
# A heartbeat comes every 10 s; where nobody says whether a run lives, it does if one is so new.
FRESH_S = 60.0
SILENT_S = 120.0


@dataclass(frozen=True)
class RunState:
    """
    Attributes:
        detail: why it is in that state, if there is more to say.
        where: the job and its nodes, or the process, if it lives.
        step: the last one that was logged, 0 before the first.
        tokens_per_s: median of the last steps, None before the first.
        checkpoint: the step of the newest one, None before the first; and how old it is.
        eta_s: until the last step, of a run that trains.
        excluded: nodes that its jobs avoid.
        failures: of the attempts that have failed, oldest first.
    """

    run: RunDirectory
    state: State
    detail: str
    where: str
    attempt: int
    step: int
    steps: int
    tokens_per_s: float | None
    checkpoint: int | None
    checkpoint_age_s: float | None
    eta_s: float | None
    excluded: tuple[Excluded, ...]
    failures: tuple[Failure, ...]

    @property
    def is_live(self) -> bool:
        return self.state in LIVE


def read_state(run: RunDirectory, slurm: Slurm | None) -> RunState:
    """
    Args:
        slurm: None on a machine without; its jobs are then known by their heartbeats alone.

    Raises:
        UserError: not a run directory.
        SlurmError: Slurm does not answer.
    """
    config = read_run_config(run)
    attempts = run.all_attempts()
    state, detail, where = _state(run, attempts, jobs_of(run, slurm) if slurm else [])
    if state == "prepared" and slurm:
        detail = _end_of_newest_job(run, slurm)
    rows = _recent_rows(run)
    step = int(rows[-1]["train/step"]) if rows else 0
    tokens_per_s = median(row["perf/tokens_per_s"] for row in rows) if rows else None
    saved, saved_age_s = _marker(run.saved), _age_s(run.saved)
    # Steps of other phases have other lengths.
    phases, steps = phases_of(config), config.train.steps
    # None are left of a run that has logged more steps than it is to have by now.
    tokens_left = max(0, tokens_until(phases, steps) - tokens_until(phases, step))
    return RunState(
        run=run,
        state=state,
        detail=detail,
        where=where,
        attempt=attempts[-1] if attempts else 0,
        step=step,
        steps=steps,
        tokens_per_s=tokens_per_s,
        checkpoint=saved.get("step"),
        checkpoint_age_s=saved_age_s if saved else None,
        eta_s=tokens_left / tokens_per_s if state == "running" and tokens_per_s else None,
        excluded=tuple(excluded_now(run)),
        failures=tuple(filter(None, (read_failure(run, attempt) for attempt in attempts))),
    )


def _state(
    run: RunDirectory, attempts: Sequence[int], jobs: Sequence[JobInfo]
) -> tuple[State, str, str]:
    """The state, why, and where the run is."""
    if jobs:
        return _state_of_job(run, jobs[-1])
    launcher = launcher_of(run)
    if launcher and launcher.is_alive:
        state: State = "cancelling" if read_cancelled(run) else "running"
        return state, _silence(run, attempts), str(launcher)
    if run.done.exists():
        return "done", "", ""
    if pids := live_ranks(run):
        return "ending", "its launcher is gone", f"ranks {', '.join(map(str, pids))}"
    cancelled = read_cancelled(run)
    if cancelled and cancelled.holds_for(newest_jobs(run)):
        return "cancelled", f"by {cancelled.by}", ""
    if not attempts:
        return "prepared", "", ""
    if failure := read_failure(run, attempts[-1]):
        return "failed", str(failure), ""
    if stopped := _marker(run.stopped):
        return "stopped", str(stopped.get("reason", "")), ""
    age_s = _age_s(_heartbeats(run, attempts))
    if age_s is not None and age_s < FRESH_S:
        return "running", "", _elsewhere(run)
    seen = "" if age_s is None else f"last heard of {duration_text(age_s)} ago; "
    return "lost", f"{seen}nobody has written down why it ended", ""


def _state_of_job(run: RunDirectory, job: JobInfo) -> tuple[State, str, str]:
    where = f"job {job.id}" + (f" on {', '.join(job.nodes)}" if job.nodes else "")
    if job.state == "RUNNING":
        cancelled = read_cancelled(run)
        is_cancelled = cancelled is not None and cancelled.holds_for([job.id])
        state: State = "cancelling" if is_cancelled else "running"
        return state, _silence(run, run.all_attempts()), where
    if job.state == "PENDING":
        starts = f", starts {job.started:%Y-%m-%d %H:%M} at the latest" if job.started else ""
        return "queued", f"{job.reason}{starts}", where
    if job.state == "COMPLETING":
        return "ending", "", where
    return "queued", f"Slurm says {job.state}", where


def _end_of_newest_job(run: RunDirectory, slurm: Slurm) -> str:
    """Of a run that has no attempt: another job that had to succeed first may have failed."""
    numbers = newest_jobs(run)
    job = slurm.job(numbers[-1]) if numbers else None
    if job is None or not job.is_over or job.folder not in ("", str(run.root)):
        return ""
    # Others are what it has waited for, not why it has ended.
    reason = f", {job.reason}" if job.reason.startswith("Dependency") else ""
    return f"job {job.id} has ended before one: {job.state}{reason}"


def _silence(run: RunDirectory, attempts: Sequence[int]) -> str:
    age_s = _age_s(_heartbeats(run, attempts))
    is_silent = age_s is not None and age_s > SILENT_S
    return f"no heartbeat for {duration_text(age_s or 0)}" if is_silent else ""


def _heartbeats(run: RunDirectory, attempts: Sequence[int]) -> Path:
    return run.folder_of(attempts[-1] if attempts else 0) / HEARTBEATS


def _elsewhere(run: RunDirectory) -> str:
    job = job_of_newest_attempt(run)
    return f"job {job}" if job else str(launcher_of(run) or "")


def _recent_rows(run: RunDirectory) -> list[dict[str, Any]]:
    rows = []
    with suppress(FileNotFoundError):
        for line in last_lines(run.metrics, RECENT_STEPS):
            with suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def _marker(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        marker: dict[str, Any] = json.loads(path.read_text())
        return marker
    return {}


def _age_s(path: Path) -> float | None:
    try:
        return max(0.0, datetime.now(UTC).timestamp() - path.stat().st_mtime)
    except OSError:
        return None
