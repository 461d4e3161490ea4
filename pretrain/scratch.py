"""A folder for what is made beside its place and moved there, or needed for a while only."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

# Of no other program: what has it and is not held is removed.
LOCK = "farspan-scratch.lock"


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """An empty folder in a hidden one beside a path, and gone afterwards.

    What processes have left there that were killed is removed by the next one, where the file
    system has locks.
    """
    prefix = f".{beside.name}."
    for hidden in beside.parent.iterdir():
        if hidden.name.startswith(prefix):
            _remove_if_left(hidden)
    with TemporaryDirectory(prefix=prefix, dir=beside.parent) as name:
        hidden = Path(name)
        folder = hidden / "scratch"
        folder.mkdir()
        with (hidden / "unheld").open("wb") as lock:
            # Under the name that others look for it is always held.
            with suppress(OSError):
                _hold(lock)
                (hidden / "unheld").rename(hidden / LOCK)
            yield folder


def _remove_if_left(hidden: Path) -> None:
    # Where that fails its process lives, has just removed it itself, or there are no locks.
    with suppress(OSError), (hidden / LOCK).open("r+b") as lock:
        _hold(lock)
        shutil.rmtree(hidden, ignore_errors=True)


def _hold(lock: IO[bytes]) -> None:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
