"""How much memory of this machine a process can still use."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class _Files(NamedTuple):
    """Of a control group: its limit, what is used of it, and how much of that is idle cache."""

    limit: str
    used: str
    cache: str


V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = _Files("memory.max", "memory.current", "inactive_file")


def available_memory(
    proc: Path = Path("/proc"), control_groups: Path = Path("/sys/fs/cgroup")
) -> int:
    """Bytes that this process can still use: what the machine has, and each of the control groups
    above it. Page cache that nobody uses is not in the way: the kernel drops it (cgroups(7)).
    """
    fields = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
    of_machine = int(fields["MemAvailable"].split()[0]) * 1024
    return min([of_machine, *_of_groups(proc, control_groups)])


def _of_groups(proc: Path, control_groups: Path) -> Iterator[int]:
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, files = control_groups, V2
        elif "memory" in controllers.split(","):
            root, files = control_groups / "memory", V1
        else:
            continue
        group = root / path.lstrip("/")
        # In a container the upper ones, the own one, or some of its files, may not be there to be
        # seen.
        for above in (group, *group.parents):
            limit, used = _text(above / files.limit), _text(above / files.used)
            if limit not in ("", "max") and used:
                stat = dict(line.split() for line in _text(above / "memory.stat").splitlines())
                yield int(limit) - int(used) + int(stat.get(files.cache, 0))
            if above == root:
                break


def _text(file: Path) -> str:
    return file.read_text().strip() if file.exists() else ""
