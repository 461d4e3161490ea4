"""What a start of a job does before its ranks: `python -m launch.slurm.begin RUN_DIR WORDS_DIR`.

It makes an attempt, prints and keeps the environment of its ranks, and leaves four files for the
batch script in WORDS_DIR, of words that end with a zero byte: `modules` to load, what each node has
to do before (`prepare`), `options` of srun, and the `command` of each rank. Without a command
nothing is to be started here: the run is done, or the job has been put back into the queue, as its
nodes are none for it.

Exit codes: 0, or 2 for a mistake, or 1 for anything else, such as a run that is given up; after
these two the job ends.
"""

import getpass
import os
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from launch.causes import Cause
from launch.environment import Variable, describe, environment_of_ranks, note_environment
from launch.failures import judge, note_failure, read_failure
from launch.local import PORTS, is_free
from launch.slurm.client import PATIENCE_OF_JOBS_S, Slurm, SlurmError
from launch.slurm.container import before_container, in_container, options_of_srun
from launch.slurm.excludes import avoidable, excluded_now, learn, nodes_of_site
from launch.slurm.file_systems import folders_of, node_folders_of
from launch.slurm.job import read_job
from launch.slurm.profile import Profile
from launch.slurm.requeue import MAX_RESTARTS, requeue_elsewhere
from launch.slurm.start import Start, has_stopped, limit_of, start_of
from parallel.heartbeat import HEARTBEATS
from pretrain.config import read_run_config
from pretrain.errors import TrainingError, UserError
from pretrain.run_dir import RunDirectory

RANK = Path(__file__).parents[2] / "slurm" / "rank.sh"
# A prime number, so that jobs and attempts beside each other begin far apart.
PORTS_TRIED = 101
# Ranks that are heard of for so long after a node's slurmd was started again, as for an update,
# have outlived that; those that have lost another one end sooner.
OUTLIVED = timedelta(minutes=30)
# In a row a job goes back into the queue because of the nodes that it was given.
AVOIDED_TIMES = 3


def begin(run: RunDirectory, words: Path, slurm: Slurm) -> int:
    """Prepare an attempt, or leave the words out where there is to be none.

    Returns:
        An exit code: not 0 if there is to be none, and the run is not done.

    Raises:
        UserError: the run directory or its job is not what it should be.
        SlurmError: Slurm does not answer.
    """
    config, start, job = read_run_config(run), Start.of_this_job(slurm), read_job(run)
    profile = job.profile if job else Profile()
    catch_up(run, start, slurm, profile)
    verdict = judge(run, start.chain, MAX_RESTARTS, start.job)
    if not verdict.goes_on:
        print(f"not started: {verdict.text}", flush=True)
        return 0 if run.done.exists() else 1
    if avoided := _avoided(run, start, slurm, profile):
        print(f"not started on {', '.join(avoided)}, which this run avoids", flush=True)
        requeue_elsewhere(run, slurm, start, profile)
        return 0
    take_from_start_before(run, start, slurm)
    attempt = run.new_attempt()
    start.note(run, attempt)
    try:
        variables = environment_of_start(start, profile, slurm, attempt)
    except (UserError, SlurmError) as error:
        return _try_elsewhere(run, slurm, start, profile, attempt, str(error))
    note_environment(run, attempt, variables)
    print(
        f"attempt {attempt} of {run.root}: job {start.job}, start {start.restart + 1}, "
        f"{start.ranks} ranks on {', '.join(start.nodes)}\n{describe(variables)}",
        flush=True,
    )
    python = os.environ.get("FARSPAN_PYTHON", "python")
    if profile.container.runtime != "none":
        python = profile.container.python
    command = [
        *("env", *(f"{one.name}={one.value}" for one in variables)),
        *("bash", "-c", RANK.read_text(), "rank", python),
        *(str(run.root), str(run.folder_of(attempt))),
    ]
    shared, local = folders_of(config), node_folders_of(config, scratch_of(profile, start))
    folders = list(map(str, (run.root, *shared.values(), *local.values())))
    made = [*filter(None, [shared.get("checkpoint.dir")]), *local.values()]
    write_words(words / "modules", profile.modules)
    write_words(words / "prepare", before_container(profile.container, made))
    write_words(words / "options", options_of_srun(profile.container, folders))
    command = in_container(profile, folders, command)
    write_words(words / "command", command)
    return 0


def _try_elsewhere(
    run: RunDirectory, slurm: Slurm, start: Start, profile: Profile, attempt: int, error: str
) -> int:
    """The first node does not do what others may: note that, and let another start try."""
    failure = note_failure(run, attempt, start.chain, Cause("error", None, start.nodes[0], error))
    verdict = judge(run, start.chain, MAX_RESTARTS, start.job)
    print(f"attempt {attempt} has failed: {failure}\n{verdict.text}", file=sys.stderr, flush=True)
    if not verdict.goes_on:
        return 1
    requeue_elsewhere(run, slurm, start, profile)
    return 0


def catch_up(run: RunDirectory, start: Start, slurm: Slurm, profile: Profile) -> None:
    """Note why the start before this one ended, if it could not: its node may be gone."""
    attempts = run.all_attempts()
    before = start_of(run, attempts[-1]) if attempts else None
    if before is None or not start.goes_on_from(before):
        return
    if read_failure(run, attempts[-1]) or has_stopped(run, attempts[-1]):
        return
    if limit := limit_of(run, attempts[-1]):
        note_failure(run, attempts[-1], start.chain, Cause("killed", None, "", limit))
        return
    since = max(datetime.fromisoformat(before.began), _last_heard(run, attempts[-1]) - OUTLIVED)
    # Of all: a node that its site has removed is an error to ask for.
    for node in slurm.nodes():
        if node.name not in before.nodes:
            continue
        comings_back = [moment for moment in (node.booted, node.started) if moment]
        if node.has_failed or any(moment > since for moment in comings_back):
            why = node.reason or (node.state if node.has_failed else "it was started again")
            cause = Cause("node", None, node.name, f"the node has failed: {why}")
            learn(run, note_failure(run, attempts[-1], start.chain, cause), profile.exclude_for_s)


def _last_heard(run: RunDirectory, attempt: int) -> datetime:
    """When rank 0 has written the last heartbeats of an attempt."""
    with suppress(OSError):
        return datetime.fromtimestamp((run.folder_of(attempt) / HEARTBEATS).stat().st_mtime, UTC)
    return datetime.fromtimestamp(0, UTC)


def take_from_start_before(run: RunDirectory, start: Start, slurm: Slurm) -> None:
    """Slurm has ended it, but cannot see to that on a node which it does not reach."""
    attempts = run.all_attempts()
    before = start_of(run, attempts[-1]) if attempts else None
    if before and _is_over(before, start, slurm) and (holder := run.take_from(attempts[-1])):
        print(f"{holder} is out of reach and may live on: it is fenced off", flush=True)


def _is_over(before: Start, start: Start, slurm: Slurm) -> bool:
    """Whether an earlier start has ended, as Slurm sees it: of this job, or of one on this cluster
    that was cancelled, say, and submitted again.
    """
    if start.goes_on_from(before):
        return True
    if before.cluster not in ("", start.cluster):
        return False
    job = slurm.job(before.job)
    return job is None or job.is_over


def rendezvous(start: Start, slurm: Slurm) -> tuple[str, int]:
    """Where rank 0 is found: this machine, the first of the job, and a port that is free on it.

    Another port in each attempt, or ranks of two could meet.
    """
    first = (int(start.job) * 7 + start.restart) * PORTS_TRIED % len(PORTS)
    ports = (PORTS[(first + more) % len(PORTS)] for more in range(PORTS_TRIED))
    return _address(start, slurm), next(filter(is_free, ports), PORTS[first])


def _address(start: Start, slurm: Slurm) -> str:
    """The name of the first node, or where Slurm reaches it if the name does not lead there."""
    if len(start.nodes) == 1:
        return "127.0.0.1"
    name = start.nodes[0]
    if _leads_away(name):
        return name
    address = slurm.nodes(name)[0].address
    if _is_number(address) or _leads_away(address):
        return address
    # It is known as itself here, to others by the address with which it reaches them.
    for other in start.nodes[1:]:
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((other, PORTS[0]))
            found: str = probe.getsockname()[0]
            return found
    raise UserError(
        f"rank 0 would not be found: neither the name of its node, {name}, nor its NodeAddr, "
        f"{address}, has an address that others could use. The site has to mend its DNS or "
        "/etc/hosts; `farspan launch doctor` tells which nodes have the problem"
    )


def _leads_away(name: str) -> bool:
    """Whether a name has an address that is not this machine's own loopback."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}
    except OSError:
        return False
    return not any(ip_address(address.partition("%")[0]).is_loopback for address in found)


def _is_number(address: str) -> bool:
    with suppress(ValueError):
        ip_address(address)
        return True
    return False


def _avoided(run: RunDirectory, start: Start, slurm: Slurm, profile: Profile) -> list[str]:
    """Nodes of this start that the run avoids, if there are enough others."""
    met = [entry for entry in excluded_now(run) if entry.node in start.nodes]
    if not met or _in_vain(run, start):
        return []
    nodes = nodes_of_site(slurm, profile)
    kept = avoidable(excluded_now(run), nodes, len(start.nodes), start.partition, profile)
    for entry in met:
        if entry not in kept:
            print(f"{entry.node} is used again, there are too few others: {entry.why}", flush=True)
    return [entry.node for entry in met if entry in kept]


def _in_vain(run: RunDirectory, start: Start) -> bool:
    """Whether Slurm has given the job such nodes again and again, whatever it was told."""
    attempts = run.all_attempts()
    before = start_of(run, attempts[-1]) if attempts else None
    since = before.restart if before and start.goes_on_from(before) else -1
    return start.restart - since > AVOIDED_TIMES


def environment_of_start(
    start: Start, profile: Profile, slurm: Slurm, attempt: int | None
) -> list[Variable]:
    address, port = rendezvous(start, slurm)
    return environment_of_ranks(
        ranks=start.ranks,
        ranks_here=max(start.tasks),
        address=address,
        port=port,
        cpus=int(os.environ.get("SLURM_CPUS_PER_TASK") or 1),
        attempt=attempt,
        profile=profile,
        scratch=scratch_of(profile, start),
    )


def scratch_of(profile: Profile, start: Start) -> str | None:
    """The folder on each node's own disk."""
    if profile.scratch is None:
        return None
    return profile.scratch.replace("{user}", getpass.getuser()).replace("{job}", start.job)


def write_words(path: Path, words: Iterable[str]) -> None:
    path.write_bytes(b"".join(os.fsencode(word) + b"\0" for word in words))


def tell_errors(run: RunDirectory, work: Callable[[], int], how_on: str = "") -> int:
    """The exit code of `work`; what a person can mend is told without a traceback.

    Args:
        how_on: what to do then.
    """
    try:
        return work()
    except (UserError, TrainingError, SlurmError) as error:
        what, code = str(error), error.exit_code
    except OSError as error:
        if not run.is_cause_of(error):
            raise
        what, code = run.explain(error), TrainingError.exit_code
    print(f"error: {what}{how_on}", file=sys.stderr)
    return code


def main(arguments: Sequence[str]) -> int:
    root, words = map(Path, arguments)
    run = RunDirectory(root.resolve())
    return tell_errors(run, lambda: begin(run, words, Slurm(patience_s=PATIENCE_OF_JOBS_S)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
