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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from launch.data_run import DataRun, report
from launch.slurm.checks import Checks
from launch.slurm.client import JobInfo, Slurm, SlurmError
from launch.slurm.data_checks import check_data_jobs
from launch.slurm.data_job import DataJob, JobFolder, Stage
from launch.slurm.options import REQUEUE
from launch.slurm.profile import Profile, load_profile
from pretrain.errors import UserError

if TYPE_CHECKING:
    from data_pipeline.parts import State

SCRIPT = Path(__file__).parents[2] / "slurm" / "data.sbatch"
DEFAULT_PROFILE = "generic"
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

    profile_name = request.profile or DEFAULT_PROFILE
    profile = load_profile(profile_name)
    if request.tasks is None:
        raise UserError(
            "--engine slurm needs --tasks N: by how many jobs archives are cleaned, and shards "
            "written, each with --workers processors"
        )
    slurm = Slurm()
    folder = JobFolder(out.resolve())
    run.memory_bytes()
    parted = run.parted(out)
    state = parted.state()
    tasks = min(request.tasks, len(state.cleaned))
    checks = check_data_jobs(
        slurm, profile, run, folder.out, tasks=tasks, workers=request.workers, time=request.time
    )
    before = folder.read()
    jobs = _known(slurm, folder, before)
    if at_work := [info for info in jobs if not info.is_over]:
        checks.problems.append(_waits_for(out, at_work))
    for line in (*_progress(out, state, tasks, request.tasks), *failures_of(folder, before, jobs)):
        say(line)
    steps = steps_left(state, tasks)
    if not steps:
        report(parted.finish(), out, console)
        return
    options = [_options(step, profile, request, folder) for step in steps]
    if request.is_dry:
        say(str(_with_slurms_word(checks, slurm, options[0])))
    if checks.problems:
        raise UserError("\n".join(checks.problems))
    job = DataJob(run, os.getcwd(), tasks, profile_name, profile, sys.executable)
    if request.is_dry or request.is_by_hand:
        lines = _by_hand(folder, job, steps, options)
    else:
        lines = _submit(slurm, folder, job, steps, options)
    with nullcontext() if request.is_dry else _alone(folder):
        if not request.is_dry:
            if folder.read() != before:
                raise UserError(f"{out}: another command has submitted its jobs meanwhile")
            folder.remove_marks()
            folder.write(job)
        for line in lines:
            say(line)
    if request.is_dry:
        say(f"\n{SCRIPT}:\n{SCRIPT.read_text()}")


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


def _known(slurm: Slurm, folder: JobFolder, before: DataJob | None) -> list[JobInfo]:
    """The folder's jobs, at work and of the last time, that Slurm knows of."""
    names = {folder.job_name(stage) for stage in Stage}
    queued = slurm.call("squeue", "--noheader", "--me", f"--name={','.join(names)}", "--format=%F")
    ids = [one.job for one in before.submissions] if before else []
    # Numbers come again: the job of that number may be another one by now.
    return [
        info for info in slurm.jobs(dict.fromkeys([*ids, *queued.split()])) if info.name in names
    ]


def _with_slurms_word(checks: Checks, slurm: Slurm, options: Sequence[str]) -> Checks:
    """What Slurm says of the first of the jobs, besides."""
    if not checks.problems:
        try:
            checks.holds.append(f"Slurm: {slurm.when_it_would_start(SCRIPT, options)}")
        except SlurmError as error:
            checks.problems.append(f"Slurm would refuse it: {error}")
    return checks


def _progress(out: Path, state: "State", tasks: int, asked: int | None) -> Iterator[str]:
    archives, cleaned = len(state.cleaned), sum(state.cleaned)
    if asked != tasks:
        yield f"--tasks {asked}: there are {archives} archives, so {tasks} parts are enough"
    yield f"{out}: {cleaned} of {archives} archives are cleaned"
    if state.written:
        yield f"{out}: {sum(state.written)} of {len(state.written)} shards are written"


def failures_of(folder: JobFolder, before: DataJob | None, jobs: list[JobInfo]) -> Iterator[str]:
    """What of the last time has failed, why, and where it has said so."""
    failed = [info for info in jobs if info.is_over and info.state != "COMPLETED"]
    stages = {folder.job_name(stage): stage for stage in Stage}
    for info in failed[:LISTED_AT_MOST]:
        stage = stages[info.name]
        part = "" if info.task is None else f" part {info.task} of {before.tasks if before else 0}"
        if info.reason.startswith("Dependency"):
            yield f"{stage} (job {info.id}): cancelled, because a job before it has failed"
            continue
        code = f", exit code {info.exit_code}" if info.exit_code else ""
        log = folder.log(stage, info.task)
        yield f"{stage}{part} (job {info.id}): {info.state}{code}; see {log}"
    if len(failed) > LISTED_AT_MOST:
        yield f"... and {len(failed) - LISTED_AT_MOST} more"


def _waits_for(out: Path, at_work: list[JobInfo]) -> str:
    ids = list(dict.fromkeys(info.array or info.id for info in at_work))
    states = ", ".join(
        f"{info.id} ({info.name}: {info.state})" for info in at_work[:LISTED_AT_MOST]
    )
    more = f" and {len(at_work) - LISTED_AT_MOST} more" if len(at_work) > LISTED_AT_MOST else ""
    return (
        f"{out}: jobs of this folder have not ended: {states}{more}. Wait for them, or stop them: "
        f"scancel {' '.join(ids)}"
    )


def _options(step: Step, profile: Profile, request: Request, folder: JobFolder) -> list[str]:
    """What sbatch is told of a job, but for what it waits for."""
    log = folder.log(step.stage, None if step.parts is None else "%a")
    options = {
        "job-name": folder.job_name(step.stage),
        "array": None if step.parts is None else array_of(step.parts),
        # A % of the folder's own is not to be replaced.
        "output": str(folder.path).replace("%", "%%") + f"/{log.name}",
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "reservation": profile.reservation,
        "time": request.time or profile.time,
        "cpus-per-task": request.workers,
        "mem": profile.memory,
        "signal": f"TERM@{profile.stop_before_s}",
    }
    listed = [f"--{option}={value}" for option, value in options.items() if value is not None]
    exclusive = ["--exclusive"] if profile.exclusive else []
    return [*listed, REQUEUE, *exclusive, *profile.options]


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
        yield f"logs: {folder.path}; the same command again says what has come of them"
    except BaseException:
        for number in taken:
            slurm.cancel(number)
        raise


def _behind(job: str) -> list[str]:
    # Without the second one a job whose condition can no longer come true waits for ever.
    return [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"]


def _by_hand(
    folder: JobFolder, job: DataJob, steps: Sequence[Step], options: Sequence[Sequence[str]]
) -> Iterator[str]:
    """The jobs as lines for a shell, in which each is a variable."""
    before = None
    for step, listed in zip(steps, options, strict=True):
        command = f"{PYTHON}={shlex.quote(job.python)} "
        command += shlex.join(["sbatch", "--parsable", "--export=ALL", *listed])
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
