"""A folder for what is made beside its place and moved there, or needed for a while only."""

import fcntl
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO

# Of no other program: what has it and is not held is removed.
LOCK = "farspan-scratch.lock"


def make_writable(folder: Path) -> None:
    """Make a folder, if it is not there. Raises OSError if nothing can be written in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder):
        pass


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """An empty folder in a hidden one beside a path, and gone afterwards.

    What processes have left there that were killed is removed by the next one on their machine,
    where the file system has locks.
    """
    prefix = f".{beside.name}."
    for hidden in beside.parent.iterdir():
        if hidden.name.startswith(prefix):
            _remove_if_left(hidden)
    with TemporaryDirectory(prefix=prefix, dir=beside.parent) as name:
        hidden = Path(name)
        folder = hidden / "scratch"
        folder.mkdir()
        with (hidden / "unheld").open("wb", buffering=0) as lock:
            # Under the name that others look for it is always held.
            with suppress(OSError):
                _hold(lock)
                lock.write(_host())
                (hidden / "unheld").rename(hidden / LOCK)
            yield folder


def _remove_if_left(hidden: Path) -> None:
    # Where that fails its process lives, has just removed it itself, or there are no locks.
    with suppress(OSError), (hidden / LOCK).open("r+b") as lock:
        # Some file systems have locks for each machine: those of another one look free.
        if lock.read() == _host():
            _hold(lock)
            shutil.rmtree(hidden, ignore_errors=True)


def _host() -> bytes:
    return f"{socket.gethostname()}\n".encode()


def _hold(lock: IO[bytes]) -> None:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
