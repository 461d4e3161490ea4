"""torch's flight recorder: the last collectives that this rank has started, and how far they came.

On NCCL a collective does not block the thread that calls it, so a stack does not tell where a rank
waits; the recorder does. On gloo it knows what was called, but neither when it began nor ended.
"""

import json
import os
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch._C import _distributed_c10d

# What is there depends on the build of torch.
_c10d: Any = _distributed_c10d

# Whether it is known when a collective begins on the GPU, and how long it takes.
TIMING = ("TORCH_NCCL_ENABLE_TIMING", "NCCL_ENABLE_TIMING")
# What groups of NCCL read when they are made; the older of two names wins.
SETTINGS = {
    TIMING: "1",
    # Collectives that are kept.
    ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "2000",
    # For ranks whose interpreter is blocked: NCCL's watchdog needs none.
    ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
}
TRUE = ("y", "yes", "1", "t", "true")


class Recorded(NamedTuple):
    """A collective that has been enqueued and has not completed.

    Attributes:
        name: its kind and its number within its group, such as `all_reduce 17`.
        group: what torch calls the group.
        ranks: that take part.
        has_begun: on the GPU, which otherwise still computes what comes before it.
    """

    name: str
    group: str
    ranks: tuple[int, ...]
    has_begun: bool


def record_nccl(environment: MutableMapping[str, str]) -> None:
    """Let the groups of NCCL that are made from now on record what this module reads.

    What the user has set stays.
    """
    for (name, *older), value in SETTINGS.items():
        if not any(old in environment for old in older):
            environment.setdefault(name, value)


def is_timed() -> bool:
    """Whether the recorder knows when a collective of NCCL begins."""
    value = next((os.environ[name] for name in reversed(TIMING) if name in os.environ), "")
    return value.lower() in TRUE


def has_nccl() -> bool:
    """Whether this build of torch records collectives of NCCL."""
    return hasattr(_c10d, "_dump_nccl_trace_json")


def write_dump(path: Path) -> None:
    """Write what the recorder holds, for `torchfrtrace` (torch.distributed.flight_recorder)."""
    name = "_dump_nccl_trace" if has_nccl() else "_dump_fr_trace"
    path.write_bytes(getattr(_c10d, name)(includeStackTraces=False))


def oldest_pending() -> Recorded | None:
    """The first collective of NCCL that this rank has yet to get over; None without one."""
    if not has_nccl():
        return None
    return oldest_in(json.loads(_c10d._dump_nccl_trace_json()))


def oldest_in(trace: dict[str, Any]) -> Recorded | None:
    """The oldest collective of a dump that has not completed."""
    entries = trace.get("entries", [])
    batches = {_place(entry) for entry in entries if _is_batch(entry)}
    pending = [
        entry
        for entry in entries
        # Those of a batch stay as they were enqueued: only the batch has events of the GPU.
        if entry["state"] != "completed" and (_is_batch(entry) or _place(entry) not in batches)
    ]
    if not pending:
        return None
    entry = min(pending, key=lambda entry: entry["record_id"])
    uid, description = entry["process_group"]
    kind = entry["profiling_name"].rpartition(":")[2]
    # The two sides of a transfer call it differently.
    name = "send and receive" if entry["is_p2p"] else f"{kind} {entry['collective_seq_id']}"
    ranks = json.loads(trace["pg_config"].get(uid, {}).get("ranks", "[]"))
    return Recorded(name, description, tuple(ranks), entry["state"] == "started")


def _is_batch(entry: dict[str, Any]) -> bool:
    """Whether it stands for all that `batch_isend_irecv` or a coalescing manager has enqueued."""
    return bool(entry["profiling_name"].endswith("coalesced"))


def _place(entry: dict[str, Any]) -> tuple[str, bool, int]:
    """The group and the number within it, which a batch shares with its members."""
    number = entry["p2p_seq_id" if entry["is_p2p"] else "collective_seq_id"]
    return entry["process_group"][0], entry["is_p2p"], number


class CollectiveTime:
    """Adds up how long collectives of NCCL took on this rank, its waiting for the others included.

    Without timing (`record_nccl`) the recorder has no durations.
    """

    def __init__(self) -> None:
        self._is_timed = has_nccl() and is_timed()
        self._total_s = 0.0
        self._next = 0

    def total_s(self) -> float:
        """Up to now; 0 where nothing is timed.

        The recorder keeps 2000 collectives (TORCH_FR_BUFFER_SIZE). Those between two calls that it
        has dropped count as much as those that it has kept.
        """
        if self._is_timed:
            self.add(json.loads(_c10d._dump_nccl_trace_json()).get("entries", []))
        return self._total_s

    def add(self, entries: Sequence[dict[str, Any]]) -> None:
        """Count what has completed since the last call.

        Args:
            entries: of a dump, in the order in which they were enqueued.
        """
        new = [e for e in entries if e["record_id"] >= self._next and "duration_ms" in e]
        if not new:
            return
        last = new[-1]["record_id"]
        dropped = max(0, entries[0]["record_id"] - self._next)
        share = (last + 1 - self._next) / (last + 1 - self._next - dropped)
        self._total_s += share * sum(e["duration_ms"] for e in new) / 1000
        self._next = last + 1
