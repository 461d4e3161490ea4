"""`farspan launch cancel`: let a run save and stop, and see to it that nothing of it goes on."""

import getpass
import os
import shlex
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from launch.cancelled import mark_cancelled
from launch.durations import duration_text
from launch.run_state import read_state
from launch.slurm.client import JobInfo, Slurm, SlurmError
from launch.starters import jobs_of, launcher_of, live_ranks, slurm_here
from pretrain.config import read_run_config
from pretrain.errors import TrainingError, UserError
from pretrain.run_dir import RunDirectory

POLL_S = 0.2
POLL_OF_SLURM_S = 1.0
# A request that comes before the ranks can answer may be lost.
ASK_AGAIN_S = 10.0
# It may just have been starting ranks.
KILL_AGAIN_S = 1.0
# What a last checkpoint may take.
SAVE_S = 300.0
# Until Slurm has cleaned up after processes that were killed.
END_S = 180.0


def cancel(run: RunDirectory, at_once: bool) -> None:
    """End a run, so that it is not started again by itself; says what it does.

    Args:
        at_once: without saving, which is waited for five minutes otherwise.

    Raises:
        UserError: not a run directory, or trained by a process of another machine.
        TrainingError: something of it cannot be ended.
    """
    read_run_config(run)
    slurm = slurm_here()
    jobs = jobs_of(run, slurm) if slurm else []
    state = read_state(run, slurm)
    if not state.is_live:
        print(f"nothing of {run.root} runs: it is {state.state}")
        return
    if not jobs and not _is_alive(run) and not live_ranks(run):
        raise UserError(
            f"{run.root} is trained by {state.where or 'a launcher that is not of farspan'}, and "
            f"nothing of that is on this machine, {socket.gethostname()}: cancel it there"
        )
    # Before anything is asked to stop, or it would be started again.
    by = f"{getpass.getuser()} on {socket.gethostname()}"
    mark_cancelled(run, by, [job.id for job in jobs])
    if slurm and jobs:
        _cancel_jobs(run, slurm, jobs, at_once)
    else:
        _cancel_processes(run, at_once)
    after = read_state(run, slurm)
    if after.state == "done":
        print(f"{run.root} has finished its last step meanwhile: it is done")
        return
    saved = f"the newest checkpoint is that of step {after.checkpoint}"
    print(
        f"cancelled, {'no checkpoint yet' if after.checkpoint is None else saved}; `farspan launch "
        f"resubmit {shlex.quote(str(run.root))}` goes on from there"
    )


def _cancel_jobs(run: RunDirectory, slurm: Slurm, jobs: Sequence[JobInfo], at_once: bool) -> None:
    began = time.monotonic()
    asked_at: dict[str, float] = {}
    while jobs:
        elapsed_s = time.monotonic() - began
        saves = not at_once and elapsed_s < SAVE_S
        for job in jobs:
            is_due = time.monotonic() - asked_at.get(job.id, -ASK_AGAIN_S) >= ASK_AGAIN_S
            if is_due and job.state != "COMPLETING":
                _ask_to_end(slurm, job, saves and job.state == "RUNNING", job.id not in asked_at)
                asked_at[job.id] = time.monotonic()
        if elapsed_s > (0 if at_once else SAVE_S) + END_S:
            raise TrainingError(
                f"job {jobs[0].id} is {jobs[0].state} still: a process that the kernel cannot end, "
                f"or a node that does not answer. `scontrol show job {jobs[0].id}` says where; "
                "Slurm ends it once the node is back"
            )
        time.sleep(POLL_OF_SLURM_S)
        jobs = jobs_of(run, slurm)


def _ask_to_end(slurm: Slurm, job: JobInfo, saves: bool, is_first: bool) -> None:
    if saves:
        if is_first:
            print(f"job {job.id} saves and stops ({duration_text(SAVE_S)} at most)", flush=True)
        slurm.cancel(job.id, signal="USR2")
        return
    print(f"job {job.id} is ended, it is {job.state.lower()}", flush=True)
    if job.state == "RUNNING":
        # Of this the ranks die; Slurm itself begins with SIGTERM, at which they save.
        with suppress(SlurmError):
            slurm.cancel(job.id, signal="HUP")
    slurm.cancel(job.id)


def _cancel_processes(run: RunDirectory, at_once: bool) -> None:
    launcher = launcher_of(run)
    if launcher and launcher.is_alive:
        if not at_once:
            print(f"{launcher} saves and stops ({duration_text(SAVE_S)} at most)", flush=True)
            _send(launcher.pid, signal.SIGTERM)
            _wait(lambda: not _is_alive(run), SAVE_S)
        # It starts no others, as the run is cancelled.
        deadline = time.monotonic() + END_S
        while _is_alive(run) and time.monotonic() < deadline:
            for pid in live_ranks(run):
                _send(pid, signal.SIGKILL)
            _wait(lambda: not _is_alive(run), KILL_AGAIN_S)
        if _is_alive(run):
            _send(launcher.pid, signal.SIGKILL)
    elif ranks := live_ranks(run):
        # They have noticed that their launcher is gone, and save.
        print(f"its launcher is gone; {len(ranks)} ranks save and stop", flush=True)
        _wait(lambda: not live_ranks(run), 0 if at_once else SAVE_S)
    for pid in live_ranks(run):
        _send(pid, signal.SIGKILL)
    if not _wait(lambda: not live_ranks(run), END_S):
        raise TrainingError(
            f"SIGKILL does not end {', '.join(map(str, live_ranks(run)))}: the kernel waits for a "
            "device, or a file system that is gone (/proc/PID/stack says where)"
        )


def _is_alive(run: RunDirectory) -> bool:
    launcher = launcher_of(run)
    return bool(launcher and launcher.is_alive)


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _wait(is_over: Callable[[], bool], at_most_s: float) -> bool:
    deadline = time.monotonic() + at_most_s
    while not is_over():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
