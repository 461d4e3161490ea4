"""What a job of a data run does on its node: `python -m launch.slurm.data_task OUT STAGE`.

Exit codes: 0 done, and `done-JOB` lies in OUT/slurm; 75 stopped on request, another start goes on;
2 a mistake in what was asked for, 1 any other failure.
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from data_pipeline.parts import Part, State
from launch.data_run import report
from launch.progress import show_progress
from launch.slurm.data_job import DataJob, JobFolder, Stage
from launch.stoppable import stoppable
from pretrain.errors import UserError
from pretrain.run_dir import write_atomically

# In a row.
STARTS_WITHOUT_PROGRESS = 3


def main() -> None:
    """Do the part of a job; an error that carries an `exit_code` is told in its own words."""
    out, stage = sys.argv[1:]
    console = Console()
    try:
        with stoppable(console):
            do_job(Path(out).resolve(), Stage(stage), console)
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(code)


def do_job(out: Path, stage: Stage, console: Console) -> None:
    """Do what the job, or the task of an array, in whose environment this process is has to do.

    Raises:
        UserError: the folder has no parameters, or starts in a row came to nothing.
        DataError: as `farspan data run` does.
    """
    folder = JobFolder(out)
    job = folder.required()
    number = os.environ["SLURM_JOB_ID"]
    part = _part(job, stage)
    workers = int(os.environ.get("SLURM_CPUS_PER_TASK", 1))
    # Paths are named as seen from there.
    os.chdir(job.folder)
    run = job.run.parted(out)
    count_start(folder.starts(number), _finished(run.state(), stage, part))
    with show_progress(console) as progress:
        match stage:
            case Stage.clean:
                archives = run.clean(part, workers, progress)
                print(f"{out}: cleaned part {part.number}/{part.of}, {archives} archives")
            case Stage.dedup:
                shards = run.deduplicate(workers, job.run.memory_bytes(), progress)
                print(f"{out}: deduplicated, what is kept goes into {shards} shards")
            case Stage.shards:
                shards = run.write_shards(part, workers, progress)
                print(f"{out}: wrote part {part.number}/{part.of}, {shards} shards")
            case Stage.finish:
                report(run.finish(workers, progress), out, console)
    folder.done(number).touch()
    folder.starts(number).unlink(missing_ok=True)


def _part(job: DataJob, stage: Stage) -> Part:
    """The part that this task of an array has, or all of it."""
    number = os.environ.get("SLURM_ARRAY_TASK_ID")
    if stage.is_parted and number is not None:
        if not 1 <= int(number) <= job.tasks:
            raise UserError(f"task {number} of the array: there are parts 1 to {job.tasks}")
        return Part(int(number), job.tasks)
    return Part(1, 1)


def _finished(state: State, stage: Stage, part: Part) -> int:
    """How much of what the job is for is done."""
    match stage:
        case Stage.clean:
            return sum(state.cleaned[number] for number in part.among(len(state.cleaned)))
        case Stage.shards:
            written = state.written or ()
            return sum(written[number] for number in part.among(len(written)))
        case _:
            return state.stages


def count_start(path: Path, finished: int) -> None:
    """Remember how far a start of the job finds it, and refuse one of too many that found no more.

    A job whose time limit is too short for one archive would be requeued for ever.
    """
    before = {"finished": -1, "starts": 0}
    with suppress(OSError, ValueError):
        before = json.loads(path.read_text())
    starts = before["starts"] + 1 if finished == before["finished"] else 1
    write_atomically(path, json.dumps({"finished": finished, "starts": starts}))
    if starts > STARTS_WITHOUT_PROGRESS:
        raise UserError(
            f"given up: {STARTS_WITHOUT_PROGRESS} starts of this job in a row have finished "
            "nothing, each of them stopped before it could. If that was the time limit, give the "
            "command again with more --time, more --tasks or more --workers"
        )


if __name__ == "__main__":
    main()
