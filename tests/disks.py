"""Disks with little room, or the locks of NFS, for the tests of what happens on them."""

import errno
import fcntl
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_flock = fcntl.flock


def flock_of_nfs4(file: IO[bytes], operation: int) -> None:
    """`fcntl.flock` as NFSv4 has it: an exclusive lock needs a file that is open for writing, and a
    shared one a file that is open for reading (flock(2), NFS details).
    """
    mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
    if mode == (os.O_RDONLY if operation & fcntl.LOCK_EX else os.O_WRONLY):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    _flock(file, operation)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Lets no file of this process grow beyond `size` bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class SmallDisk:
    """A file system of its own in memory, which can be filled. Needs root, on Linux."""

    def __init__(self, folder: Path, size: str) -> None:
        """Raises CalledProcessError where nothing may be mounted."""
        self.folder = folder
        self._ballast = folder / "ballast"
        folder.mkdir()
        mount = ("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
        subprocess.run(mount, check=True, capture_output=True, text=True)

    def unmount(self) -> None:
        # Lazily: a process that a failed test has left behind may still use it.
        subprocess.run(("umount", "--lazy", str(self.folder)), check=True)

    def reserve(self, file: Path, size: int) -> None:
        """Room into which `file` can grow when the disk is full."""
        subprocess.run(("fallocate", "--keep-size", "-l", str(size), str(file)), check=True)

    def fill(self) -> None:
        with self._ballast.open("wb", buffering=0) as file:
            for block in (bytes(1 << 20), bytes(4096)):
                try:
                    while True:
                        file.write(block)
                except OSError:
                    pass

    def make_room(self) -> None:
        self._ballast.unlink()
