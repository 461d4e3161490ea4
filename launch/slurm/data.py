"""`farspan data run --engine slurm`: what is left of a run, as jobs that wait for one another.

    clean, an array  ->  dedup  ->  shards, an array  ->  finish

A job starts when those before it have done what they are for. Where one has not, Slurm cancels all
behind it, and the same command submits what is left.
"""

import fcntl
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from launch.data_run import DataRun
from launch.slurm.client import JobInfo, Slurm
from launch.slurm.data_job import DataJob, JobFolder, Stage
from launch.slurm.profile import Profile, load_profile, seconds_of
from pretrain.errors import UserError

if TYPE_CHECKING:
    from data_pipeline.parts import State

SCRIPT = Path(__file__).parents[2] / "slurm" / "data.sbatch"
PYTHON = "FARSPAN_PYTHON"
# More of them are told as a number.
LISTED_AT_MOST = 10


@dataclass(frozen=True)
class Request:
    """What the command line says of the jobs.

    Attributes:
        tasks: into how many parts the archives, and the shards, are parted.
        workers: processors of each job.
        time: its limit, as sbatch takes it; None: the profile's.
        is_dry: only say what would be submitted.
        is_by_hand: write the parameters, for a person to submit the jobs.
    """

    tasks: int | None
    workers: int
    profile: str | None
    time: str | None
    is_dry: bool
    is_by_hand: bool


@dataclass(frozen=True)
class Step:
    """A job that is to be submitted; of an array the parts that are not done."""

    stage: Stage
    parts: tuple[int, ...] | None = None


def submit_data_run(run: DataRun, out: Path, request: Request, console: Console) -> None:
    """Submit what is left of a run, and say which jobs do it.

    Raises:
        UserError: something that is not allowed, no Slurm here, or jobs of this folder that have
            not ended.
        DataError: as `farspan data run` without Slurm.
        SlurmError: Slurm refuses a job; those submitted before it have been cancelled.
    """

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    profile_name = request.profile or "generic"
    profile = _with_time(load_profile(profile_name), request.time)
    slurm = Slurm()
    tasks = _checked_tasks(request.tasks, slurm)
    folder = JobFolder(_checked_out(out))
    run.memory_bytes()
    state = run.parted(out).state()
    tasks = min(tasks, len(state.cleaned))
    before = folder.read()
    jobs = _known(slurm, before)
    for line in (*_progress(out, state, tasks, request.tasks), *_failures(folder, before, jobs)):
        say(line)
    at_work = [info for info in jobs if not info.is_over]
    if at_work and not request.is_dry:
        raise UserError(f"{out}: {_waits_for(at_work)}")
    if at_work:
        say(_waits_for(at_work))
    steps = steps_left(state, tasks)
    if not steps:
        say(f"{out} is finished already: same inputs, same options")
        return
    job = DataJob(run, os.getcwd(), tasks, profile_name, profile, sys.executable)
    options = [_options(step, profile, request.workers, folder) for step in steps]
    if not request.is_dry:
        with _alone(folder):
            folder.remove_marks()
            folder.write(job)
            if not request.is_by_hand:
                for line in _submit(slurm, folder, job, steps, options):
                    say(line)
                say(f"logs: {folder.path}; the same command again says what has come of them")
                return
    for line in _by_hand(folder, steps, options):
        say(line)


def steps_left(state: "State", tasks: int) -> list[Step]:
    """The jobs that have something to do, in order."""
    if state.is_finished:
        return []
    uncleaned = unfinished_parts(state.cleaned, tasks)
    finish = Step(Stage.finish)
    if uncleaned or state.written is None:
        every_part = tuple(range(1, tasks + 1))
        clean = [Step(Stage.clean, uncleaned)] if uncleaned else []
        # How many shards there will be is not known before: some of the parts may have none.
        return [*clean, Step(Stage.dedup), Step(Stage.shards, every_part), finish]
    unwritten = unfinished_parts(state.written, tasks)
    return [*([Step(Stage.shards, unwritten)] if unwritten else []), finish]


def unfinished_parts(done: Sequence[bool], tasks: int) -> tuple[int, ...]:
    """The parts with something that is not done, from 1 on."""
    from data_pipeline.parts import Part

    parts = (Part(number, tasks) for number in range(1, tasks + 1))
    return tuple(part.number for part in parts if not all(done[n] for n in part.among(len(done))))


def array_of(parts: Iterable[int]) -> str:
    """Numbers as sbatch takes them, as in 1-3,7."""
    ranges = []
    for _, group in groupby(enumerate(sorted(parts)), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in group]
        ranges.append(f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0]))
    return ",".join(ranges)


def _with_time(profile: Profile, time: str | None) -> Profile:
    """The profile with the limit that was asked for, which leaves time to do something."""
    try:
        seconds = seconds_of(time or profile.time or "UNLIMITED")
    except ValueError as error:
        if time is None:
            return profile
        raise UserError(f"--time {time}: {error}") from None
    if seconds <= profile.stop_before_s:
        raise UserError(
            f"--time {time or profile.time}: a job is asked to stop {profile.stop_before_s} s "
            "before its limit (stop_before_s of the profile), so at once; give it more"
        )
    return profile.model_copy(update={"time": time or profile.time})


def _checked_tasks(tasks: int | None, slurm: Slurm) -> int:
    if tasks is None:
        raise UserError(
            "--engine slurm needs --tasks N: by how many jobs archives are cleaned, and shards "
            "written, each with --workers processors"
        )
    # Tasks are numbered from 1; the setting is what a number must be below.
    at_most = int(slurm.config().get("MaxArraySize", 1001)) - 1
    if tasks > at_most:
        raise UserError(
            f"--tasks {tasks}: this cluster takes arrays of {at_most} at most (MaxArraySize - 1); "
            f"with --tasks {at_most} each of them has more archives"
        )
    return tasks


def _checked_out(out: Path) -> Path:
    """Absolute, as the jobs see it."""
    if "\\" in str(out.resolve()):
        raise UserError(
            f"--out {out}: has a backslash, which Slurm gives a meaning in the names of logs; "
            "choose another folder"
        )
    return out.resolve()


def _known(slurm: Slurm, before: DataJob | None) -> list[JobInfo]:
    """What Slurm still knows of the jobs that were submitted the last time."""
    ids = [one.job for one in before.submissions] if before else []
    names = {stage.job_name for stage in Stage}
    # Numbers come again: the job of that number may be another one by now.
    return [info for info in slurm.jobs(ids) if info.name in names]


def _progress(out: Path, state: "State", tasks: int, asked: int | None) -> Iterator[str]:
    archives, cleaned = len(state.cleaned), sum(state.cleaned)
    if asked != tasks:
        yield f"--tasks {asked}: there are {archives} archives, so {tasks} parts are enough"
    yield f"{out}: {cleaned} of {archives} archives are cleaned"
    if state.written:
        yield f"{out}: {sum(state.written)} of {len(state.written)} shards are written"


def _failures(folder: JobFolder, before: DataJob | None, jobs: list[JobInfo]) -> Iterator[str]:
    """What of the last time has failed, why, and where it has said so."""
    failed = [info for info in jobs if info.is_over and info.state != "COMPLETED"]
    stages = {one.job: one.stage for one in before.submissions} if before else {}
    for info in failed[:LISTED_AT_MOST]:
        stage = stages[info.array or info.id]
        part = "" if info.task is None else f" part {info.task} of {before.tasks if before else 0}"
        if info.reason.startswith("Dependency"):
            yield f"{stage} (job {info.id}): cancelled, because a job before it has failed"
            continue
        code = f", exit code {info.exit_code}" if info.exit_code else ""
        log = folder.log(stage, info.task)
        yield f"{stage}{part} (job {info.id}): {info.state}{code}; see {log}"
    if len(failed) > LISTED_AT_MOST:
        yield f"... and {len(failed) - LISTED_AT_MOST} more"


def _waits_for(at_work: list[JobInfo]) -> str:
    ids = list(dict.fromkeys(info.array or info.id for info in at_work))
    states = ", ".join(
        f"{info.id} ({info.name}: {info.state})" for info in at_work[:LISTED_AT_MOST]
    )
    more = f" and {len(at_work) - LISTED_AT_MOST} more" if len(at_work) > LISTED_AT_MOST else ""
    return (
        f"jobs of this folder have not ended: {states}{more}. Wait for them, or stop them: "
        f"scancel {' '.join(ids)}"
    )


def _options(step: Step, profile: Profile, workers: int, folder: JobFolder) -> list[str]:
    """What sbatch is told of a job, but for what it waits for."""
    log = folder.log(step.stage, None if step.parts is None else "%a")
    options = {
        "job-name": step.stage.job_name,
        "array": None if step.parts is None else array_of(step.parts),
        # A % of the folder's own is not to be replaced.
        "output": str(folder.path).replace("%", "%%") + f"/{log.name}",
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "reservation": profile.reservation,
        "time": profile.time,
        "cpus-per-task": workers,
        "signal": f"TERM@{profile.stop_before_s}",
    }
    listed = [f"--{option}={value}" for option, value in options.items() if value is not None]
    return [*listed, *profile.options]


def _submit(
    slurm: Slurm,
    folder: JobFolder,
    job: DataJob,
    steps: Sequence[Step],
    options: Sequence[Sequence[str]],
) -> Iterator[str]:
    """Submit each step behind the one before, and say so; all or none."""
    taken: list[str] = []
    try:
        for step, listed in zip(steps, options, strict=True):
            waits = _behind(taken[-1]) if taken else []
            arguments = [str(folder.out), step.stage.value]
            environment = {PYTHON: job.python}
            taken.append(slurm.submit(SCRIPT, [*listed, *waits], arguments, environment))
            job = job.submitted(step.stage, taken[-1], step.parts)
            folder.write(job)
            parts = f", parts {array_of(step.parts)} of {job.tasks}" if step.parts else ""
            yield f"submitted job {taken[-1]}: {step.stage}{parts}" + (
                f", after {taken[-2]}" if waits else ""
            )
    except BaseException:
        for number in taken:
            slurm.cancel(number)
        raise


def _behind(job: str) -> list[str]:
    # Without the second one a job whose condition can no longer come true waits for ever.
    return [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"]


def _by_hand(
    folder: JobFolder, steps: Sequence[Step], options: Sequence[Sequence[str]]
) -> Iterator[str]:
    """The jobs as lines for a shell, in which each is a variable."""
    before = None
    for step, listed in zip(steps, options, strict=True):
        command = shlex.join(["sbatch", "--parsable", *listed])
        if before is not None:
            command += f" --dependency=afterok:${before} --kill-on-invalid-dep=yes"
        arguments = shlex.join([str(SCRIPT), str(folder.out), step.stage.value])
        yield f"{step.stage}=$({command} {arguments})"
        before = step.stage.value


@contextmanager
def _alone(folder: JobFolder) -> Iterator[None]:
    """Keep another command from submitting jobs of this folder at the same time.

    Raises:
        UserError: one is about to.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    with (folder.path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder.out}: another command is submitting its jobs") from None
        yield
