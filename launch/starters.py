"""Who starts the attempts of a run: a process on this or another machine, or jobs of Slurm."""

import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launch.local import rank_pids
from launch.slurm.client import JobInfo, Slurm
from launch.slurm.job import read_job
from launch.slurm.start import start_of
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory

# Of the jobs of a run only the newest can still be there.
SUBMISSIONS = 3


@dataclass(frozen=True)
class Launcher:
    """A process that trains a run, or has trained it last.

    Attributes:
        is_alive: None where it is on another machine.
    """

    pid: int
    host: str
    is_alive: bool | None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def launcher_of(run: RunDirectory) -> Launcher | None:
    """The process that holds, or held last, the right to start attempts."""
    try:
        holder = run.launcher_lock.read_text(errors="replace")
    except OSError:
        return None
    found = re.fullmatch(r"process (\d+) on (.*)\n", holder)
    if not found:
        return None
    pid, host = int(found[1]), found[2]
    is_here = host == socket.gethostname()
    return Launcher(pid, host, _holds(pid, run.launcher_lock) if is_here else None)


def live_ranks(run: RunDirectory) -> list[int]:
    """The process ids of the ranks on this machine of the newest attempt that still run."""
    with suppress(OSError, ValueError):
        return [pid for pid in rank_pids(run) if _is_rank_of(pid, run)]
    return []


def slurm_here(environment: Mapping[str, str] | None = None) -> Slurm | None:
    with suppress(UserError):
        return Slurm(environment)
    return None


def jobs_of(run: RunDirectory, slurm: Slurm) -> list[JobInfo]:
    """The jobs of a run that wait, run or end at the moment; oldest first. Raises SlurmError."""
    folders = {str(run.root)}
    # One that was submitted by hand works somewhere else.
    attempts = run.all_attempts()
    if attempts and (start := start_of(run, attempts[-1])):
        folders.add(start.folder)
    # Another cluster, or a new one, gives the same numbers to the jobs of others.
    return [
        job
        for job in slurm.jobs(newest_jobs(run))
        if not job.is_over and (job.folder in folders or not job.folder)
    ]


def newest_jobs(run: RunDirectory) -> list[str]:
    """The numbers of the jobs of a run that can be there still; oldest first."""
    job = read_job(run)
    numbers = [submission.id for submission in job.submissions[-SUBMISSIONS:]] if job else []
    # One that was submitted by hand is known by its attempt.
    numbers += [number for number in [job_of_newest_attempt(run)] if number]
    return list(dict.fromkeys(numbers))


def job_of_newest_attempt(run: RunDirectory) -> str | None:
    """The number of the job that made it; None where no job did."""
    attempts = run.all_attempts()
    start = start_of(run, attempts[-1]) if attempts else None
    return start.job if start else None


def _holds(pid: int, lock: Path) -> bool:
    """Whether a process on this machine has `lock` open; the number alone may be another's now."""
    files = Path(f"/proc/{pid}/fd")
    try:
        for file in files.iterdir():
            with suppress(OSError):
                if file.samefile(lock):
                    return True
    except PermissionError:
        return True
    except OSError:
        return not files.parents[1].is_dir() and _is_there(pid)
    return False


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _is_rank_of(pid: int, run: RunDirectory) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return not Path("/proc/self").exists() and _is_there(pid)
    return str(run.root).encode() in command.split(b"\0")
