"""The job of a run: what was asked for when it was submitted, in RUN/job.json."""

import json
from datetime import UTC, datetime

from pydantic import ValidationError

from launch.slurm.profile import Profile
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory, write_atomically
from pretrain.settings import Positive, Section


class Submission(Section):
    """A job that Slurm has taken; each goes on where the one before has ended.

    Attributes:
        why: in words: submitted, resubmitted, or which nodes it avoids.
        cluster: its name; "" where Slurm does not tell it.
    """

    id: str
    time: datetime
    why: str
    cluster: str = ""


class Job(Section):
    """What is submitted, and was so far.

    Attributes:
        name: in Slurm's queue.
        time: the limit of each job, as sbatch takes it; None: the partition's.
        profile: without `auto`.
        python: the interpreter that has farspan, on the nodes as well.
        dependency: of the first submission, as sbatch takes it.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    name: str
    nodes: Positive
    ranks_per_node: Positive
    time: str | None = None
    dependency: str | None = None
    profile_name: str
    profile: Profile
    python: str
    submissions: tuple[Submission, ...] = ()

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    def submitted(self, number: str, why: str, cluster: str = "") -> "Job":
        """With one submission more."""
        submission = Submission(id=number, time=datetime.now(UTC), why=why, cluster=cluster)
        return self.model_copy(update={"submissions": (*self.submissions, submission)})


def read_job(run: RunDirectory) -> Job | None:
    """The job of a run, None where it has none: trained elsewhere, or submitted by hand.

    Raises:
        UserError: the file is not what farspan has written.
    """
    try:
        text = run.job.read_text()
    except FileNotFoundError:
        return None
    try:
        return Job.model_validate_json(text)
    except ValidationError as error:
        problem = "; ".join(str(line["msg"]) for line in error.errors())
        raise UserError(
            f"{run.job} cannot be read ({problem}): remove it, and submit the run again with "
            "`farspan launch slurm`"
        ) from None


def write_job(run: RunDirectory, job: Job) -> None:
    """Replace the job of a run: a reader sees the old one or the new one, never a half."""
    tree = job.model_dump(mode="json")
    write_atomically(run.job, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
