"""The jobs of a data run under Slurm: what they are to do, in OUT/slurm/job.json."""

import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from launch.data_run import DataRun
from launch.slurm.profile import Profile
from pretrain.errors import UserError
from pretrain.run_dir import write_atomically

# Of a job's name what tells its folder.
NAME_LENGTH = 40
HASH_LENGTH = 8


class Stage(StrEnum):
    """What a job does; each waits for the one before."""

    clean = "clean"
    dedup = "dedup"
    shards = "shards"
    finish = "finish"

    @property
    def is_parted(self) -> bool:
        """Whether the tasks of an array do it, a part each."""
        return self in (Stage.clean, Stage.shards)


@dataclass(frozen=True)
class Submission:
    """A job that Slurm has taken.

    Attributes:
        parts: those that it does, from 1 on; None where it does all of it.
    """

    stage: Stage
    job: str
    parts: tuple[int, ...] | None
    time: str


@dataclass(frozen=True)
class DataJob:
    """What the jobs are to do.

    Attributes:
        folder: from which paths are seen.
        tasks: how many parts there are.
        profile: of the site.
        python: the interpreter that has farspan, on the nodes as well.
        submissions: of the last time that the command was given.
    """

    run: DataRun
    folder: str
    tasks: int
    profile_name: str
    profile: Profile
    python: str
    submissions: tuple[Submission, ...] = ()

    def submitted(self, stage: Stage, job: str, parts: tuple[int, ...] | None) -> "DataJob":
        """With one submission more."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        submission = Submission(stage, job, parts, time)
        return replace(self, submissions=(*self.submissions, submission))


@dataclass(frozen=True)
class JobFolder:
    """OUT/slurm: the parameters, and what its jobs write beside them."""

    out: Path

    @property
    def path(self) -> Path:
        return self.out / "slurm"

    @property
    def job(self) -> Path:
        return self.path / "job.json"

    def job_name(self, stage: Stage) -> str:
        """In Slurm's queue; no other folder's jobs have it."""
        name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", self.out.name)[:NAME_LENGTH]
        folder = hashlib.sha256(os.fsencode(self.out)).hexdigest()[:HASH_LENGTH]
        return f"{stage}-{name}-{folder}"

    def log(self, stage: Stage, part: int | str | None = None) -> Path:
        """Of a job, or of a task of an array."""
        return self.path / (f"{stage}.log" if part is None else f"{stage}-{part}.log")

    def done(self, job: str) -> Path:
        """There once a job has done what it is for; the batch script looks for it."""
        return self.path / f"done-{job}"

    def starts(self, job: str) -> Path:
        """How far a job was when it was started the last time."""
        return self.path / f"starts-{job}.json"

    def remove_marks(self) -> None:
        """Remove what jobs have left that were killed; none may be at work."""
        for path in [*self.path.glob(self.done("*").name), *self.path.glob(self.starts("*").name)]:
            path.unlink(missing_ok=True)

    def read(self) -> DataJob | None:
        """The parameters; None where there are none.

        Raises:
            UserError: the file is not what farspan has written.
        """
        try:
            text = self.job.read_text()
        except FileNotFoundError:
            return None
        try:
            return _from_json(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{self.job} cannot be read ({' '.join(str(error).split())}): remove it, and give "
                "the command again that has written it"
            ) from None

    def required(self) -> DataJob:
        """The parameters. Raises UserError where there are none, too."""
        job = self.read()
        if job is None:
            raise UserError(
                f"{self.job} is missing, which says what is to be done: `farspan data run ... "
                f"--out {self.out} --engine slurm --tasks N --prepare-only` writes it"
            )
        return job

    def write(self, job: DataJob) -> None:
        """Replace the parameters: a reader sees the old ones or the new ones, never a half."""
        self.path.mkdir(parents=True, exist_ok=True)
        # In ASCII: a name of a file need not be UTF-8.
        write_atomically(self.job, json.dumps(_to_json(job), indent=1) + "\n")


def _to_json(job: DataJob) -> dict[str, Any]:
    return {
        "run": job.run.to_json(),
        "folder": job.folder,
        "tasks": job.tasks,
        "profile_name": job.profile_name,
        "profile": job.profile.model_dump(mode="json"),
        "python": job.python,
        "submissions": [
            {"stage": one.stage, "job": one.job, "parts": one.parts, "time": one.time}
            for one in job.submissions
        ],
    }


def _from_json(tree: dict[str, Any]) -> DataJob:
    submissions = tuple(
        Submission(
            Stage(one["stage"]),
            str(one["job"]),
            None if one["parts"] is None else tuple(one["parts"]),
            one["time"],
        )
        for one in tree["submissions"]
    )
    return DataJob(
        run=DataRun.from_json(tree["run"]),
        folder=str(tree["folder"]),
        tasks=int(tree["tasks"]),
        profile_name=tree["profile_name"],
        profile=Profile.model_validate(tree["profile"]),
        python=str(tree["python"]),
        submissions=submissions,
    )
