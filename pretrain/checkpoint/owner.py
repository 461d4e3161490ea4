"""Whose checkpoints lie in a folder that several runs could be told to save to."""

import json
import secrets
from collections.abc import Callable
from pathlib import Path

from pretrain.checkpoint.target import Target
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory, write_atomically

OWNER = "run.json"


def refuse_anothers(target: Target, run: RunDirectory) -> None:
    """Raise UserError if a folder has been claimed by another run than this one."""
    place = target / OWNER
    if not place.exists():
        return
    owner = json.loads(place.read())
    other = RunDirectory(Path(owner["directory"]))
    if owner["run"] != _id_of(run) or _is_copy(run, other):
        raise UserError(
            f"checkpoint.dir = {target} has the checkpoints of another run, {other.root}: "
            f"{run.root} would go on from its weights, and remove its checkpoints. Name another "
            f"checkpoint.dir; or, if that run is gone for good, remove {place}"
        )


def claim(target: Target, run: RunDirectory, check: Callable[[], None]) -> None:
    """Let a folder have the checkpoints of this run, and of no other.

    Args:
        check: raises if nothing may be changed there.

    Raises:
        UserError: as `refuse_anothers`.
    """
    refuse_anothers(target, run)
    place = target / OWNER
    if not place.exists():
        target.make()
        owner = {"run": _id_of(run), "directory": str(run.root)}
        place.commit(f"{json.dumps(owner)}\n".encode(), check)


def _id_of(run: RunDirectory) -> str:
    """Made at its first use; a directory that is renamed keeps it, and so does a copy."""
    if not run.id.exists():
        write_atomically(run.id, f"{secrets.token_hex(8)}\n")
    return run.id.read_text().strip()


def _is_copy(run: RunDirectory, other: RunDirectory) -> bool:
    """Whether there are both, and one is a copy of the other."""
    if not other.id.exists() or other.root.samefile(run.root):
        return False
    return _id_of(other) == _id_of(run)
