"""The files of a stage: a folder that is there whole or not at all, and is checked when read."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

FILES = "files.sha256"


def make_stage(folder: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a folder of another name, and put it in place with the hashes of its files.

    A process that is killed leaves nothing under the name of `folder`; what it left beside it is
    removed when the stage is made again. One process at a time may make a stage.
    """
    for left in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(left)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    write(aside)
    hashes = {
        str(path.relative_to(aside)): _sha256(path)
        for path in sorted(aside.rglob("*"))
        if path.is_file()
    }
    listed = json.dumps(hashes, indent=1).encode()
    (aside / FILES).write_bytes(hashlib.sha256(listed).hexdigest().encode() + b"\n" + listed)
    aside.rename(folder)


def is_made(folder: Path) -> bool:
    """Whether a stage is finished and its files are what they were; one that is damaged is removed.

    The damaged file is named on stderr. Reads all files, at the speed of sha256.
    """
    if not folder.is_dir():
        return False
    damage = _damage(folder)
    if damage is None:
        return True
    print(f"warning: {damage}; it is made again", file=sys.stderr, flush=True)
    shutil.rmtree(folder)
    return False


def _damage(folder: Path) -> str | None:
    try:
        own, _, listed = (folder / FILES).read_bytes().partition(b"\n")
    except FileNotFoundError:
        return f"{folder / FILES} is missing"
    if hashlib.sha256(listed).hexdigest().encode() != own:
        return f"{folder / FILES} is damaged: its sha256 is not the one that it begins with"
    for name, sha256 in json.loads(listed).items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if _sha256(path) != sha256:
            return f"{path} is damaged: its sha256 is not the one that was written"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
