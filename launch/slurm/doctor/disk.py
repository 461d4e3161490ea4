"""Disk: is there room where ranks write, on each node?"""

import errno
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.slurm.doctor.findings import Check, Finding, listed
from pretrain.settings import Section

MIB = 1 << 20
GIB = 1 << 30
# Quotas show only when something is written.
PROBE = 4 * MIB
FULL = (errno.ENOSPC, errno.EDQUOT)
FREE_FILES = 10_000


class Disk(Section):
    """What a node finds of a folder.

    Attributes:
        wants: bytes that should be free.
        free_files: how many more it can hold; None if its file system does not count.
        error: why nothing can be written.
        full: whether that is for lack of room.
    """

    path: str
    why: str
    wants: int
    free: int = 0
    size: int = 0
    free_files: int | None = None
    error: str | None = None
    full: bool = False


class Folder(Section):
    """Where ranks write.

    Attributes:
        why: they do.
        made: whether the ranks make it, so that the doctor may.
    """

    path: str
    why: str
    wants: int
    made: bool = False


def measure(folder: Folder) -> Disk:
    """Look at a folder, and write a little into it, which is removed again."""
    here: dict[str, Any] = {"path": folder.path, "why": folder.why, "wants": folder.wants}
    is_new = folder.made and not Path(folder.path).exists()
    try:
        if is_new:
            Path(folder.path).mkdir(parents=True, exist_ok=True)
        room = os.statvfs(folder.path)
        here |= {
            "free": room.f_bavail * room.f_frsize,
            "size": room.f_blocks * room.f_frsize,
            "free_files": room.f_favail if room.f_files else None,
        }
        with tempfile.TemporaryFile(dir=folder.path) as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        here |= {"error": error.strerror or str(error), "full": error.errno in FULL}
    if is_new:
        with suppress(OSError):
            Path(folder.path).rmdir()
    return Disk(**here)


def check(measured: Mapping[str, Sequence[Disk]]) -> Check:
    """
    Args:
        measured: by node.
    """
    findings: dict[tuple[str, str], list[str]] = {}
    for node, disks in measured.items():
        for disk in disks:
            if problem := _problem(disk):
                findings.setdefault(problem, []).append(node)
    least: dict[str, int] = {}
    for disks in measured.values():
        for disk in disks:
            least[disk.path] = min(disk.free, least.get(disk.path, disk.free))
    saw = ", ".join(f"{path}: {_size(free)} free" for path, free in least.items())
    return Check(
        "disk",
        saw,
        tuple(Finding(listed(nodes), what, fix) for (what, fix), nodes in findings.items()),
    )


def _problem(disk: Disk) -> tuple[str, str] | None:
    """What is wrong with a folder, and what to do about it."""
    if disk.error and not disk.full:
        return (
            f"{disk.path} ({disk.why}) cannot be written: {disk.error}",
            "have it made, writable for you; or name another folder in the profile",
        )
    room = "remove what is not needed; or name a folder with more room in the profile"
    if disk.error:
        return f"{disk.path} ({disk.why}) is full: {disk.error}", room
    if disk.free < disk.wants:
        return (
            f"{disk.path} ({disk.why}) has {_size(disk.free)} free of {_size(disk.size)}; "
            f"{_size(disk.wants)} are wanted",
            room,
        )
    if disk.free_files is not None and disk.free_files < FREE_FILES:
        return f"{disk.path} ({disk.why}) can hold {disk.free_files} more files only", room
    return None


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"
