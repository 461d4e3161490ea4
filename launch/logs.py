"""`farspan launch logs`: the log of a rank, or of the batch jobs, as it grows over all attempts."""

import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launch.run_state import read_state
from launch.slurm.client import Slurm, SlurmError
from launch.starters import slurm_here
from launch.tails import start_of_last
from pretrain.config import read_run_config
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory

POLL_S = 0.2
# Between two questions whether the run still lives.
ASK_S = 2.0
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Logs:
    """Which logs are asked for.

    Attributes:
        attempt: None: the newest one that has a log of the rank.
        of_job: what batch jobs have printed, instead of a rank.
    """

    run: RunDirectory
    rank: int = 0
    attempt: int | None = None
    of_job: bool = False

    def newest(self) -> Path | None:
        if self.of_job:
            jobs = self.run.root.glob("slurm-*.log")
            return max(jobs, key=lambda log: log.stat().st_mtime, default=None)
        attempts = reversed(self.run.all_attempts()) if self.attempt is None else [self.attempt]
        logs = (self._of(attempt) for attempt in attempts)
        return next((log for log in logs if log.is_file()), None)

    def what_is_missing(self) -> str:
        attempts = self.run.all_attempts()
        if self.of_job:
            return f"no job has printed anything into {self.run.root} (slurm-*.log)"
        if not attempts:
            return f"{self.run.root} has no attempt yet; --follow waits for one that is on its way"
        if self.attempt is not None and self.attempt not in attempts:
            return f"{self.run.root} has no attempt {self.attempt}, only 1 to {attempts[-1]}"
        folder = self.run.folder_of(attempts[-1] if self.attempt is None else self.attempt)
        ranks = len(list(folder.glob("rank-*.log")))
        there = f"there are ranks 0 to {ranks - 1}" if ranks else "there is no log of any rank"
        return f"{self._of(int(folder.name))} is not there: in {folder} {there}"

    def _of(self, attempt: int) -> Path:
        return self.run.folder_of(attempt) / f"rank-{self.rank}.log"


def print_logs(logs: Logs, lines: int | None, follow: bool) -> None:
    """
    Args:
        lines: only so many of those that are there already; None: all.
        follow: go on until the run has ended, over all attempts to come.

    Raises:
        UserError: no such run, attempt, rank or job.
    """
    read_run_config(logs.run)
    slurm = slurm_here() if follow else None
    log, position = logs.newest(), 0
    if log is None and not (follow and _is_live(logs.run, slurm)):
        raise UserError(logs.what_is_missing())
    if log and lines is not None:
        position = start_of_last(log, lines)
    if follow:
        with suppress(KeyboardInterrupt):
            _follow(logs, log, position, slurm)
    elif log:
        _copy(log, position)


def _follow(logs: Logs, log: Path | None, position: int, slurm: Slurm | None) -> None:
    asked, is_live = time.monotonic(), True
    while is_live:
        if time.monotonic() - asked > ASK_S:
            is_live, asked = _is_live(logs.run, slurm), time.monotonic()
        # In this order: what a log gets last is in it before the next one is there.
        newest = logs.newest()
        if log:
            position = _copy(log, position)
        if newest != log and newest:
            print(f"==> {newest} <==", file=sys.stderr, flush=True)
            log, position = newest, 0
        elif is_live:
            time.sleep(POLL_S)
    if log:
        _copy(log, position)


def _is_live(run: RunDirectory, slurm: Slurm | None) -> bool:
    try:
        return read_state(run, slurm).is_live
    except SlurmError:
        # A controller that is busy or restarted comes back; this machine may have none.
        return not run.done.exists()


def _copy(log: Path, position: int) -> int:
    """Print what is in a log from `position` on. Returns where it ends now."""
    with log.open("rb") as file:
        file.seek(position)
        while block := file.read(READ_BYTES):
            sys.stdout.buffer.write(block)
        sys.stdout.buffer.flush()
        return file.tell()
