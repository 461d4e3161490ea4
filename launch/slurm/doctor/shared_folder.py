"""The shared file system: does each node see what another has written, at once, and its locks?

A run directory needs both: an attempt that lives on must read at once that another has begun, and
one process alone may hold the directory (pretrain.run_dir).
"""

import fcntl
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from launch.slurm.doctor.findings import Check, Finding, listed
from launch.slurm.doctor.waiting import wait_until
from pretrain.run_dir import NO_LOCKS, write_atomically
from pretrain.settings import Section

# How long nodes are waited for, whose ranks may start late: from a cold file system.
ARRIVE_S = 180.0
# How long a client of NFS may believe what it has seen of a folder (acdirmax).
STALE_S = 60.0
# What is seen later than that is found fault with.
LAG_S = 3.0


class Seen(Section):
    """What a node finds of the shared folder.

    Attributes:
        missing: nodes of which it has seen nothing.
        lags: for how many seconds it still read the old content of a node's file after that node
            had said that it has replaced it; None: to the end.
        lock: what became of a lock that another node holds: "refused", "granted", or the error;
            None where it was not tried.
    """

    missing: tuple[str, ...]
    lags: dict[str, float | None]
    lock: str | None


class Board:
    """A file for each node in a shared folder, by which they wait for each other."""

    def __init__(self, folder: Path, node: str) -> None:
        self._folder = folder
        self._node = node
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, stage: int, **facts: object) -> None:
        """Replace the file of this node."""
        text = json.dumps({"stage": stage, **facts})
        write_atomically(self._file(self._node), text)

    def read(self, node: str) -> dict[str, object]:
        """What a node has written last; nothing if it is not seen."""
        with suppress(OSError, ValueError):
            found: dict[str, object] = json.loads(self._file(node).read_text())
            return found
        return {}

    def stage(self, node: str) -> int:
        stage = self.read(node).get("stage", 0)
        assert isinstance(stage, int)
        return stage

    def wait(self, nodes: Iterable[str], stage: int, patience_s: float) -> list[str]:
        """Wait until all these nodes have come to a stage; returns those that have not."""
        waited = list(nodes)

        def are_there() -> bool:
            # Who has come is not asked for again: there may be a thousand.
            waited[:] = [node for node in waited if self.stage(node) < stage]
            return not waited

        wait_until(are_there, patience_s)
        return waited

    def lag(self, node: str, stage: int) -> float | None:
        """For how long the file of a node that has come to `stage` says something older."""
        if self.stage(node) >= stage:
            return 0.0
        start = time.monotonic()
        seen = wait_until(lambda: self.stage(node) >= stage, STALE_S)
        return time.monotonic() - start if seen else None

    def _file(self, node: str) -> Path:
        return self._folder / f"{node}.json"


def hold(lock: Path) -> IO[bytes]:
    """Take the lock that other nodes then try to get, for as long as the file is open."""
    file = lock.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return file


def try_lock(lock: Path) -> str:
    """What becomes of the lock that the first node holds."""
    try:
        with lock.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "refused"
    except OSError as error:
        return error.strerror or str(error)
    return "granted"


def check(measured: Mapping[str, Seen], folder: Path) -> Check:
    """
    Args:
        measured: by node.
    """
    findings = [*_missing(measured, folder), *_stale(measured, folder), *_locks(measured, folder)]
    lags = [lag for seen in measured.values() for lag in seen.lags.values() if lag is not None]
    saw = f"{folder}: seen after {max(lags, default=0.0):.1f} s at most"
    return Check("shared folder", saw, tuple(findings))


def _missing(measured: Mapping[str, Seen], folder: Path) -> list[Finding]:
    unseen_by: defaultdict[str, list[str]] = defaultdict(list)
    for node, seen in measured.items():
        for other in seen.missing:
            unseen_by[other].append(node)
    return [
        Finding(
            node,
            f"what it writes to {folder} is not seen on {listed(others)}",
            "mount the shared file system there; or name a folder with --dir that lies on one",
        )
        for node, others in unseen_by.items()
    ]


def _stale(measured: Mapping[str, Seen], folder: Path) -> list[Finding]:
    findings = []
    for node, seen in measured.items():
        late = {other: lag for other, lag in seen.lags.items() if lag is None or lag > LAG_S}
        if late:
            longest = max(STALE_S if lag is None else lag for lag in late.values())
            findings.append(
                Finding(
                    node,
                    f"files in {folder} that {listed(late)} had replaced still read as before, for "
                    f"{longest:.0f} s: an old attempt would not notice a new one",
                    "mount it so that opening a file asks the server (NFS: not nocto, actimeo=1); "
                    "or take another file system for runs",
                )
            )
    return findings


def _locks(measured: Mapping[str, Seen], folder: Path) -> list[Finding]:
    granted = [node for node, seen in measured.items() if seen.lock == "granted"]
    failed: defaultdict[str, list[str]] = defaultdict(list)
    for node, seen in measured.items():
        if seen.lock not in (None, "granted", "refused"):
            failed[str(seen.lock)].append(node)
    mount = "mount it with locks for all nodes (Lustre: -o flock; NFS: not nolock, local_lock)"
    findings = []
    if granted:
        what = f"it gets a lock in {folder} that another node holds: two jobs could hold one run"
        findings.append(Finding(listed(granted), what, mount))
    for error, nodes in failed.items():
        what = f"locks do not work in {folder}: {error}"
        findings.append(Finding(listed(nodes), what, mount))
    return findings
