"""Put a job back into the queue, away from the nodes that its run avoids for a while."""

import signal
from collections.abc import Iterable

from launch.slurm.client import JobInfo, Slurm, SlurmError
from launch.slurm.excludes import (
    Excluded,
    avoidable,
    excluded_now,
    nodes_of_site,
    nodes_to_avoid,
    read_excluded,
    ruled_out,
)
from launch.slurm.profile import Profile
from launch.slurm.start import Start
from pretrain.run_dir import RunDirectory

# In a row, after failures without progress.
MAX_RESTARTS = 3


def requeue_elsewhere(run: RunDirectory, slurm: Slurm, start: Start, profile: Profile) -> None:
    """Let the job that this process is in wait for another start. Raises SlurmError."""
    # Slurm asks the processes of the job to end, and gives them half a minute.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    slurm.requeue(start.job)
    avoid_excluded(run, slurm, start, profile)


def avoid_excluded(run: RunDirectory, slurm: Slurm, start: Start, profile: Profile) -> None:
    """Exclude nodes of a job that has been requeued.

    Slurm lets its owner do so from that moment on, while its processes still end, and not before.
    """
    nodes = nodes_of_site(slurm, profile)
    entries = avoidable(excluded_now(run), nodes, len(start.nodes), start.partition, profile)
    job = slurm.job(start.job)
    if job is None:
        return
    wanted = nodes_to_avoid(job, _known(run, slurm, profile), entries)
    if set(wanted) == set(job.excluded):
        return
    try:
        slurm.avoid(start.job, wanted)
    except SlurmError as error:
        # It has been started already: that start looks for itself.
        print(f"warning: the nodes of job {start.job} cannot be chosen: {error}", flush=True)
        return
    for entry in entries:
        print(f"avoided until {entry.until}: {entry.node}, {entry.why}", flush=True)


def let_back(
    run: RunDirectory, slurm: Slurm, profile: Profile, jobs: Iterable[JobInfo]
) -> dict[str, list[str]]:
    """Let jobs that wait have nodes again whose time is over: Slurm itself would never do so.

    Returns:
        Those nodes, by job.
    """
    over = {entry.node for entry in _known(run, slurm, profile) if entry.is_over}
    found = {}
    for job in jobs if over else ():
        nodes = [node for node in job.excluded if node in over]
        if not nodes or job.state != "PENDING":
            continue
        try:
            slurm.avoid(job.id, [node for node in job.excluded if node not in over])
        except SlurmError:
            # It has been started meanwhile, or is somebody else's.
            continue
        found[job.id] = nodes
    return found


def _known(run: RunDirectory, slurm: Slurm, profile: Profile) -> list[Excluded]:
    """Nodes that the run avoids, or did, but those that its site excludes in any case."""
    excluded = ruled_out(slurm, profile)
    return [entry for entry in read_excluded(run) if entry.node not in excluded]
