"""The files of a stage: a folder that is there whole or not at all, and is checked when read."""

import errno
import fcntl
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

FILES = "files.sha256"
OWNED = ".owned"


def make_stage(folder: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a folder of another name, and put it in place with the hashes of its files.

    A process that is killed leaves nothing under the name of `folder`; what it left beside it is
    removed when the stage is made again. Of several processes that make a stage at a time, on this
    machine or others, which is what becomes of a task whose worker is lost but alive, the first
    one to finish puts it in place: the files of all must be equal.
    """
    for left in folder.parent.glob(f".{folder.name}.*"):
        _remove_if_abandoned(left)
    aside = folder.with_name(f".{folder.name}.{uuid4().hex}")
    aside.mkdir(parents=True)
    with _owned(aside) as mark:
        write(aside)
        hashes = {
            str(path.relative_to(aside)): _sha256(path)
            for path in sorted(aside.rglob("*"))
            if path.is_file() and path != mark
        }
        listed = json.dumps(hashes, indent=1).encode()
        digest = hashlib.sha256(listed).hexdigest().encode()
        (aside / FILES).write_bytes(digest + b"\n" + listed)
        mark.unlink()
        try:
            aside.rename(folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            shutil.rmtree(aside)


@contextmanager
def _owned(aside: Path) -> Iterator[Path]:
    """A file in the folder that is locked for as long as this process works on it."""
    new, mark = aside / f"{OWNED}-new", aside / OWNED
    with new.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        new.rename(mark)  # locked from the moment when others find it
        yield mark


def _remove_if_abandoned(aside: Path) -> None:
    with suppress(FileNotFoundError, BlockingIOError), (aside / OWNED).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(aside)


def is_made(folder: Path) -> bool:
    """Whether a stage is finished and its files are what they were; one that is damaged is removed.

    The damaged file is named on stderr. Reads all files, at the speed of sha256.
    """
    if not folder.is_dir():
        return False
    damage = damage_of(folder)
    if damage is None:
        return True
    print(f"warning: {damage}; it is made again", file=sys.stderr, flush=True)
    shutil.rmtree(folder)
    return False


def damage_of(folder: Path, files: Collection[str] | None = None) -> str | None:
    """What is wrong with the files of a finished stage.

    Args:
        files: the ones to look at, by their paths in it; None: all.
    """
    try:
        own, _, listed = (folder / FILES).read_bytes().partition(b"\n")
    except FileNotFoundError:
        return f"{folder / FILES} is missing"
    if hashlib.sha256(listed).hexdigest().encode() != own:
        return f"{folder / FILES} is damaged: its sha256 is not the one that it begins with"
    hashes = json.loads(listed)
    for name, sha256 in hashes.items() if files is None else [(n, hashes.get(n)) for n in files]:
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if _sha256(path) != sha256:
            return f"{path} is damaged: its sha256 is not the one that was written"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
