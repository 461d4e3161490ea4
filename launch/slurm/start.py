"""A start of a job, as the batch script sees it: its number, nodes and ranks."""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from launch.slurm.client import SUBMISSION, Slurm
from launch.slurm.options import LOG
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory, write_atomically

# In the folder of an attempt.
LIMIT = "limit.txt"


@dataclass(frozen=True)
class Start:
    """A start of a job; kept with the attempt that it makes.

    Attributes:
        job: its number, the same over all requeues.
        restart: how often it had been requeued before.
        partition: where it runs.
        nodes: of the job, in Slurm's order; rank 0 is on the first.
        tasks: how many ranks each node has.
        began: in UTC.
        folder: where its batch script works.
        cluster: its name.
        submission: what no other job of the same number has, be it on another cluster or on one
            that counts from 1 again; "" of a job that was submitted by hand.
    """

    job: str
    restart: int
    partition: str
    nodes: tuple[str, ...]
    tasks: tuple[int, ...]
    began: str
    folder: str = ""
    cluster: str = ""
    submission: str = ""

    @classmethod
    def of_this_job(cls, slurm: Slurm, environment: Mapping[str, str] = os.environ) -> Self:
        """From what Slurm tells a batch script. Raises UserError outside of one."""
        job = environment.get("SLURM_JOB_ID")
        if not job or "SLURM_TASKS_PER_NODE" not in environment:
            raise UserError(
                "this is no job of Slurm: submit the script with sbatch, or start the run with "
                "`farspan launch slurm`"
            )
        return cls(
            job,
            int(environment.get("SLURM_RESTART_COUNT") or 0),
            environment.get("SLURM_JOB_PARTITION", ""),
            slurm.hostnames(environment["SLURM_JOB_NODELIST"]),
            tasks_per_node(environment["SLURM_TASKS_PER_NODE"]),
            datetime.now(UTC).isoformat(timespec="seconds"),
            os.getcwd(),
            environment.get("SLURM_CLUSTER_NAME", ""),
            environment.get(SUBMISSION, ""),
        )

    @property
    def chain(self) -> str:
        """What the starts of a job have in common, and no other job has."""
        return " of ".join(filter(None, (self.job, self.submission or self.cluster)))

    def goes_on_from(self, before: "Start") -> bool:
        """Whether an earlier start was one of this job; older versions noted only its number."""
        return before.chain in (self.chain, self.job)

    @property
    def log(self) -> Path:
        """What its batch script has printed."""
        return Path(self.folder, LOG.replace("%j", self.job))

    @property
    def ranks(self) -> int:
        return sum(self.tasks)

    @property
    def nodes_of_ranks(self) -> list[str]:
        """The node of each rank: consecutive ones share a node (srun --distribution=block)."""
        pairs = zip(self.nodes, self.tasks, strict=True)
        return [node for node, tasks in pairs for _ in range(tasks)]

    def note(self, run: RunDirectory, attempt: int) -> None:
        write_atomically(run.allocation_of(attempt), json.dumps(asdict(self), indent=1) + "\n")


def tasks_per_node(text: str) -> tuple[int, ...]:
    """Slurm's short form of one number for each node: 2(x3),1 is 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return tuple(int(tasks) for tasks, times in found for _ in range(int(times or 1)))


def start_of(run: RunDirectory, attempt: int) -> Start | None:
    """The start of a job that made an attempt; None where no job did."""
    try:
        start = Start(**json.loads(run.allocation_of(attempt).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return replace(start, nodes=tuple(start.nodes), tasks=tuple(start.tasks))


def attempt_of(run: RunDirectory, start: Start) -> int | None:
    """The attempt that a start of a job has made; None before it has."""
    for attempt in reversed(run.all_attempts()):
        other = start_of(run, attempt)
        if other and start.goes_on_from(other) and other.restart == start.restart:
            return attempt
    return None


def has_stopped(run: RunDirectory, attempt: int) -> bool:
    """Whether an attempt was asked to stop and has saved everything; the newest one, that is."""
    with suppress(OSError, ValueError, KeyError):
        return int(json.loads(run.stopped.read_text())["attempt"]) == attempt
    return False


def note_limit(run: RunDirectory, start: Start, how: str) -> None:
    """Write down, before anything that takes time, that Slurm has ended the attempt of a start."""
    if attempt := attempt_of(run, start):
        (run.folder_of(attempt) / LIMIT).write_text(how)


def limit_of(run: RunDirectory, attempt: int) -> str | None:
    """What `note_limit` has written down."""
    try:
        return (run.folder_of(attempt) / LIMIT).read_text()
    except OSError:
        return None
