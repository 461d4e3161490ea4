"""What an attempt died of, from the exit codes of its ranks and what is in their logs."""

import json
import os
import re
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from parallel.heartbeat import HEARTBEATS
from pretrain.errors import CANNOT_GO_ON, LOST_RANK, STOPPED_ON_REQUEST, UserError

# mistake: of the user's. final: training itself gave up. memory: of the GPU or the host. killed: by
# a signal. hang: a rank that does not arrive. lost rank: one that is dead or does not answer. node:
# it failed, as Slurm says. error: any other.
Kind = Literal["mistake", "final", "memory", "killed", "hang", "lost rank", "node", "error"]

TAIL_BYTES = 1 << 18
ERROR_LENGTH = 500
# What the ranks agree on (parallel.lost_rank); after that comes who noticed it.
VERDICT = re.compile(r"(rank (?P<rank>\d+) \(process \d+ on (?P<node>[^)]*)\)) (?P<what>.*)")
# What a rank says that has lost another one, and does not know which.
LOST_ANOTHER = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Timed out|did not come together"
)
OUT_OF_MEMORY = re.compile(r"out ?of ?memory|MemoryError|oom[_-]kill|bad_alloc", re.IGNORECASE)
ERROR_LINE = re.compile(
    r"^error: .*"
    r"|^Fatal Python error: .*"
    r"|^ *what\(\): .*"
    r"|^(?:slurmstepd|srun): error: .*(?:oom[_-]kill|Out Of Memory).*"
)
TRACEBACK = "Traceback (most recent call last):"
EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:: .*)?$")


@dataclass(frozen=True)
class Cause:
    """
    Attributes:
        rank: the one to blame, None if nobody knows.
        node: its host; "" if nobody knows.
        error: one line, without what differs from one time to the next for no reason.
    """

    kind: Kind
    rank: int | None
    node: str
    error: str


def rank_to_blame(codes: Mapping[int, int | None]) -> int:
    """The rank whose failure explains the others': killed, else mistaken, else failed.

    Args:
        codes: exit codes; None for a rank that did not end by itself, -N for signal N.
    """

    def order(rank: int) -> int:
        code = codes[rank]
        if not code:
            return 5
        if code == LOST_RANK:
            return 4
        # NCCL's watchdog aborts a rank that misses another.
        if code == -signal.SIGABRT:
            return 3
        return 0 if code < 0 else 2 if code == STOPPED_ON_REQUEST else 1

    return min(codes, key=order)


def find_cause(
    folder: Path,
    codes: Mapping[int, int | None] | None = None,
    *,
    code: int = 1,
    nodes: Sequence[str] = (),
) -> Cause:
    """Why the attempt whose logs and heartbeats lie in `folder` has failed.

    Args:
        codes: exit codes of the ranks, as for `rank_to_blame`; without them the logs have to tell.
        code: that of the whole attempt, where those of the ranks are not known.
        nodes: where the ranks ran, by rank; without them the heartbeats have to tell.
    """
    hosts = dict(enumerate(nodes)) or _hosts(folder)
    if codes and any(codes.values()):
        rank: int | None = rank_to_blame(codes)
        assert rank is not None
        code = codes[rank] or code
        line = error_line(folder / f"rank-{rank}.log")
    else:
        rank, line = _telling_line(folder)
    if code < 0 and rank is not None:
        name = f"killed by signal {-code} ({signal.Signals(-code).name})"
        # What is killed from outside has not said why.
        is_from_outside = -code in (signal.SIGKILL, signal.SIGTERM)
        error = name if is_from_outside or not line else f"{name}: {line}"
        return Cause("killed", rank, hosts.get(rank, ""), _short(error))
    if found := VERDICT.match(line):
        rank, error = int(found["rank"]), f"rank {found['rank']} {found['what']}"
        return Cause(_kind_of_verdict(found["what"]), rank, found["node"], _short(error))
    node = "" if rank is None else hosts.get(rank, "")
    why = "and no error in the log" if has_logs(folder) else "before any rank had a log"
    error = line or f"exit code {code}, {why}"
    return Cause(_kind_of(code, error), rank, node, _short(error))


def has_logs(folder: Path) -> bool:
    """Whether any rank of an attempt has begun."""
    return any(folder.glob("rank-*.log"))


def error_line(log: Path) -> str:
    """The last error that a log tells of; "" if it tells of none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    found, in_traceback = "", False
    for line in lines:
        if line.startswith(TRACEBACK):
            in_traceback = True
        elif in_traceback and EXCEPTION.match(line):
            found, in_traceback = line, False
        elif ERROR_LINE.match(line):
            found = line.strip().removeprefix("error: ")
    return found


def _telling_line(folder: Path) -> tuple[int | None, str]:
    """The error of a rank that has one of its own, else what the ranks agree on."""
    logs = sorted(folder.glob("rank-*.log"), key=_rank_of)
    found = [(_rank_of(log), line) for log in logs if (line := error_line(log))]
    return min(found, key=lambda entry: _second_hand(entry[1]), default=(None, ""))


def _second_hand(line: str) -> int:
    return 2 if LOST_ANOTHER.search(line) else 1 if VERDICT.match(line) else 0


def _rank_of(log: Path) -> int:
    return int(log.stem.removeprefix("rank-"))


def _hosts(folder: Path) -> dict[int, str]:
    with suppress(OSError, ValueError, KeyError):
        beats = json.loads((folder / HEARTBEATS).read_text())
        return {beat["rank"]: beat["host"] for beat in beats}
    return {}


def _kind_of(code: int, error: str) -> Kind:
    if code == UserError.exit_code:
        return "mistake"
    if code == CANNOT_GO_ON:
        return "final"
    return "memory" if OUT_OF_MEMORY.search(error) else "error"


def _kind_of_verdict(what: str) -> Kind:
    if what.startswith("failed: "):
        return _kind_of(1, what)
    return "lost rank" if what.startswith(("is dead", "does not answer")) else "hang"


def _short(error: str) -> str:
    """Without who noticed it, and where the stacks are."""
    line = error.partition("; noticed by ")[0]
    return line if len(line) <= ERROR_LENGTH else line[:ERROR_LENGTH] + "..."
