"""`farspan launch resubmit`: start a run again as it was started."""

import json
import shlex
import sys
from contextlib import suppress

from launch.run_state import read_state
from launch.slurm.job import read_job
from launch.starters import job_of_newest_attempt, slurm_here
from launch.train import prepare, train_locally
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory


def resubmit(run: RunDirectory, max_restarts: int, plain: bool) -> int:
    """Submit the job of a run once more, or train it here if it was trained on one machine.

    Args:
        max_restarts: on this machine; under Slurm the job says.
        plain: show no panel on a terminal.

    Returns:
        An exit code.

    Raises:
        UserError: the run lives, is done, or nobody knows how it was started.
        SlurmError: Slurm does not take the job.
    """
    state, root = read_state(run, slurm_here()), shlex.quote(str(run.root))
    if state.is_live:
        raise UserError(
            f"{run.root} is {state.state} ({state.where}): `farspan launch cancel {root}` "
            "first, or let it go on"
        )
    if state.state == "done":
        raise UserError(
            f"{run.root} is done, at step {state.step}. To train more steps start it with another "
            "train.steps, as in `farspan launch local "
            f"{shlex.quote(str(run.config))} --run-dir {root} train.steps={2 * state.steps}`"
        )
    if read_job(run):
        from launch.slurm.submit import resubmit as submit_again

        submit_again(run)
        return 0
    if job := job_of_newest_attempt(run):
        raise UserError(
            f"{run.root} was trained by job {job}, which was submitted by hand: submit it so again"
        )
    print(f"resubmitting {run.root}, which has been trained on one machine", file=sys.stderr)
    run = prepare(str(run.config), [], _ranks(run), run.root)
    return train_locally(run, _ranks(run), max_restarts, plain)


def _ranks(run: RunDirectory) -> int:
    """How many ranks the newest attempt had that has begun."""
    for attempt in reversed(run.all_attempts()):
        with suppress(OSError, ValueError, KeyError):
            return int(json.loads(run.ranks_of(attempt).read_text())["ranks"])
    raise UserError(
        f"no attempt of {run.root} has begun, so nobody knows on how many ranks: `farspan launch "
        f"local {shlex.quote(str(run.config))} --run-dir {shlex.quote(str(run.root))} --nproc N`"
    )
