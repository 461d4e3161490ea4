"""What a start of a job does after its ranks: `python -m launch.slurm.end RUN_DIR CODE [WHY]`.

It says why the attempt has ended, notes what it died of, and puts the job back into the queue,
unless the run is done, cancelled, or would fail again.

Args:
    CODE: the exit code of srun. 0 does not mean that the ranks have succeeded.
    WHY: there were none, as NODE: WHAT.

Exit codes: 0 done, or on its way to another start; 2 a mistake in what was asked for; 1 given up.
"""

import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from enum import Enum
from pathlib import Path

from launch.cancelled import mark_cancelled, read_cancelled
from launch.causes import Cause, find_cause
from launch.failures import Failure, judge, note_failure, read_failure
from launch.slurm.begin import catch_up, tell_errors
from launch.slurm.client import OVER, PATIENCE_OF_JOBS_S, JobInfo, Slurm
from launch.slurm.excludes import learn
from launch.slurm.job import read_job
from launch.slurm.profile import Profile
from launch.slurm.requeue import MAX_RESTARTS, avoid_excluded, requeue_elsewhere
from launch.slurm.start import Start, attempt_of, has_stopped, note_limit
from launch.train import try_to_report
from pretrain.errors import CANNOT_GO_ON, UserError
from pretrain.run_dir import RunDirectory

# What rank.sh makes of exit codes that forbid another start.
CODES_OF_SRUN = {252: UserError.exit_code, 251: CANNOT_GO_ON}
# How early, by its own clock, Slurm ends a job that comes to its time limit.
EARLY_S = 30


class End(Enum):
    """How a start has ended, as Slurm sees it."""

    by_itself = "its ranks have ended"
    requeued = "it is in the queue again already"
    at_the_limit = "it came to its time limit before a checkpoint was saved"
    preempted = "a job of more importance has taken its nodes before a checkpoint was saved"
    cancelled = "it was cancelled"


def end(run: RunDirectory, code: int, slurm: Slurm, why: str | None = None) -> int:
    """Decide on another start, and say why. Returns an exit code. Raises SlurmError.

    Args:
        why: the ranks could not be started, as NODE: WHAT.
    """
    if run.done.exists():
        print("done", flush=True)
        try_to_report(run)
        return 0
    start, job = Start.of_this_job(slurm), read_job(run)
    profile = job.profile if job else Profile()
    how = end_of(start, slurm.job(start.job))
    if how is End.requeued:
        # Slurm leaves the script half a minute, so the node comes first.
        catch_up(run, start, slurm, profile)
        avoid_excluded(run, slurm, start, profile)
        print(f"job {start.job} goes on as soon as there are nodes", flush=True)
        return 0
    cancelled = read_cancelled(run)
    is_cancelled = cancelled is not None and cancelled.holds_for([start.job])
    if how in (End.at_the_limit, End.preempted) and not is_cancelled:
        # Half a minute, again. Whether the run is worth it the next start decides.
        if how is End.at_the_limit:
            note_limit(run, start, how.value)
        requeue_elsewhere(run, slurm, start, profile)
        note_end(run, start, code, how)
        print(f"requeued: {how.value}", flush=True)
        return 0
    if why is not None and how is End.by_itself and (attempt := attempt_of(run, start)):
        node, _, what = why.partition(": ")
        note_failure(run, attempt, start.chain, Cause("error", None, node, what))
    failure = note_end(run, start, code, how)
    if failure:
        print(f"attempt {failure.attempt} has failed: {failure}", flush=True)
        learn(run, failure, profile.exclude_for_s)
    if how is End.cancelled:
        if not is_cancelled:
            mark_cancelled(run, f"scancel, of job {start.job}", [start.job])
        how_on = f"`farspan launch resubmit {shlex.quote(str(run.root))}` goes on"
        print(f"not started again, {how.value}: {how_on}")
        return 1
    verdict = judge(run, start.chain, MAX_RESTARTS, start.job)
    if not verdict.goes_on:
        print(verdict.text, file=sys.stderr, flush=True)
        try_to_report(run)
        return UserError.exit_code if failure and failure.kind == "mistake" else 1
    requeue_elsewhere(run, slurm, start, profile)
    print(f"requeued: {verdict.text}", flush=True)
    return 0


def end_of(start: Start, job: JobInfo | None) -> End:
    """How a start has ended. While its processes end Slurm calls all jobs alike, COMPLETING."""
    if job is None or job.state not in ("COMPLETING", "PENDING", *OVER):
        return End.by_itself
    if job.restarts > start.restart or job.state == "PENDING":
        return End.requeued
    if job.preempted:
        return End.preempted
    if job.started and job.time_limit_s:
        limit = job.started + timedelta(seconds=job.time_limit_s - EARLY_S)
        if datetime.now().astimezone() > limit:
            return End.at_the_limit
    return End.cancelled


def note_end(run: RunDirectory, start: Start, code: int, how: End) -> Failure | None:
    """Write down what the attempt of this start died of; None if it did not fail."""
    attempt = attempt_of(run, start)
    if how in (End.cancelled, End.preempted) or (attempt and has_stopped(run, attempt)):
        return None
    if attempt and (failure := read_failure(run, attempt)):
        return failure
    if how is End.at_the_limit:
        cause = Cause("killed", None, "", how.value)
    elif attempt is None:
        cause = Cause("error", None, "", f"no attempt began; srun's exit code was {code}")
    else:
        folder, nodes = run.folder_of(attempt), start.nodes_of_ranks
        codes = codes_of_ranks(folder)
        cause = find_cause(folder, codes, code=CODES_OF_SRUN.get(code, code or 1), nodes=nodes)
        if cause.rank is not None:
            # A host may call itself otherwise than Slurm does.
            cause = replace(cause, node=nodes[cause.rank])
    return note_failure(run, attempt, start.chain, cause)


def codes_of_ranks(attempt: Path) -> dict[int, int | None]:
    """Exit codes of the ranks for which it is not 0, as they have noted them: -N for signal N."""
    codes: dict[int, int | None] = {}
    for path in attempt.glob("rank-*.exit"):
        with suppress(OSError, ValueError):
            code = int(path.read_text())
            is_signal = 128 < code <= 128 + signal.NSIG
            codes[int(path.stem.removeprefix("rank-"))] = 128 - code if is_signal else code
    return codes


def main(arguments: Sequence[str]) -> int:
    root, code, *why = arguments
    run = RunDirectory(Path(root).resolve())
    how_on = f"; `farspan launch resubmit {shlex.quote(root)}` goes on"
    return tell_errors(
        run, lambda: end(run, int(code), Slurm(None, PATIENCE_OF_JOBS_S), *why), how_on
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
