"""RUN/cancelled.json: who has cancelled a run, and which of its jobs must not go on.

A job that is submitted later is none of them, however it was submitted.
"""

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from pretrain.run_dir import RunDirectory, write_atomically


@dataclass(frozen=True)
class Cancelled:
    """
    Attributes:
        time: in UTC.
        jobs: those of Slurm; none where a process of one machine has trained the run.
    """

    by: str
    time: str
    jobs: Sequence[str]

    def holds_for(self, jobs: Iterable[str]) -> bool:
        """Whether one of `jobs` is cancelled; of none, whatever is no job of Slurm."""
        asked = set(jobs)
        if not self.jobs:
            return not any(job.isdigit() for job in asked)
        return not asked.isdisjoint(self.jobs)


def mark_cancelled(run: RunDirectory, by: str, jobs: Sequence[str]) -> None:
    """Have no more attempts of these jobs, or of a launcher, begin."""
    marker = Cancelled(by, datetime.now(UTC).isoformat(timespec="seconds"), jobs)
    write_atomically(run.cancelled, json.dumps(asdict(marker)) + "\n")


def read_cancelled(run: RunDirectory) -> Cancelled | None:
    # A file that cannot be read is as good as none.
    with suppress(OSError, ValueError, TypeError):
        return Cancelled(**json.loads(run.cancelled.read_text()))
    return None
