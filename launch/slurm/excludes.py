"""Nodes that the jobs of a run avoid for a while, because attempts have died of them."""

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

from launch.failures import Failure, read_failure
from launch.slurm.checks import that_fit
from launch.slurm.client import JobInfo, NodeInfo, Slurm
from launch.slurm.options import excluded_by
from launch.slurm.profile import Profile
from pretrain.run_dir import RunDirectory, write_atomically

# What is broken on the node, whichever run it meets.
HARDWARE = re.compile(
    r"uncorrectable|\bECC\b|\bXid\b|fallen off the bus|NVLink|hardware|Bus error|"
    r"Input/output error|Read-only file system|does not answer",
    re.IGNORECASE,
)
# A process that is killed, or hangs, is the node's fault only when it happens there again.
SUSPICIOUS = ("killed", "lost rank", "hang")


@dataclass(frozen=True)
class Excluded:
    """A node in RUN/excluded.json.

    Attributes:
        since, until: in UTC.
    """

    node: str
    why: str
    since: str
    until: str

    @property
    def is_over(self) -> bool:
        return datetime.fromisoformat(self.until) <= datetime.now(UTC)


def read_excluded(run: RunDirectory) -> list[Excluded]:
    """Nodes that are avoided, and those that were, oldest first."""
    # A file that cannot be read is as good as none.
    with suppress(OSError, ValueError, TypeError):
        return [Excluded(**row) for row in json.loads(run.excluded.read_text())]
    return []


def excluded_now(run: RunDirectory) -> list[Excluded]:
    return [entry for entry in read_excluded(run) if not entry.is_over]


def exclude(run: RunDirectory, node: str, why: str, for_s: int) -> None:
    """Avoid a node from now on."""
    now = datetime.now(UTC)
    until = now + timedelta(seconds=for_s)
    others = [entry for entry in read_excluded(run) if entry.node != node]
    entry = Excluded(node, why, *(t.isoformat(timespec="seconds") for t in (now, until)))
    rows = [asdict(one) for one in (*others, entry)]
    write_atomically(run.excluded, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def learn(run: RunDirectory, failure: Failure, for_s: int) -> None:
    """Avoid the node of a failure, if it was the node's."""
    if not failure.node or not for_s:
        return
    if failure.kind == "node" or HARDWARE.search(failure.error):
        exclude(run, failure.node, f"attempt {failure.attempt}: {failure.error}", for_s)
    elif failure.kind in SUSPICIOUS and (before := _suspected_before(run, failure)):
        attempts = f"{before.attempt} and {failure.attempt}"
        exclude(run, failure.node, f"attempts {attempts}: {failure.error}", for_s)


def avoidable(
    entries: Sequence[Excluded],
    nodes: Iterable[NodeInfo],
    needed: int,
    partition: str,
    profile: Profile | None = None,
) -> list[Excluded]:
    """Those of `entries` without which a job still finds `needed` nodes; the newest first.

    A job that excludes too many would wait for ever.

    Args:
        nodes: without those that its site excludes in any case.
        profile: what its nodes must have.
    """
    usable = [node for node in nodes if node.is_usable and partition in node.partitions]
    candidates = {node.name for node in that_fit(usable, profile or Profile())}
    spare = len(candidates) - needed
    kept = []
    for entry in reversed(entries):
        cost = int(entry.node in candidates)
        if cost <= spare:
            spare -= cost
            kept.append(entry)
    return kept


def nodes_of_site(slurm: Slurm, profile: Profile) -> list[NodeInfo]:
    """All nodes but those that no job of the site is to run on. Raises SlurmError."""
    excluded = ruled_out(slurm, profile)
    return [node for node in slurm.nodes() if node.name not in excluded]


def ruled_out(slurm: Slurm, profile: Profile) -> set[str]:
    """Nodes that no job of the site is to run on. Raises SlurmError."""
    return {node for names in excluded_by(profile) for node in slurm.hostnames(names)}


def nodes_to_avoid(job: JobInfo, known: Iterable[Excluded], now: Iterable[Excluded]) -> list[str]:
    """What a job is to avoid: what its owner wants, and `now`; nothing else that is `known`."""
    ours = {entry.node for entry in known}
    owners = [node for node in job.excluded if node not in ours]
    return [*owners, *(entry.node for entry in now)]


def _suspected_before(run: RunDirectory, failure: Failure) -> Failure | None:
    """An earlier failure of this kind on the node."""
    for attempt in reversed(run.all_attempts()):
        other = read_failure(run, attempt) if attempt < failure.attempt else None
        if other and other.node == failure.node and other.kind in SUSPICIOUS:
            return other
    return None
