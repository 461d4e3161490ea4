"""Whose checkpoints lie in a folder that several runs could be told to save to."""

import secrets
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ValidationError

from pretrain.checkpoint.store import saved_steps
from pretrain.checkpoint.target import Target
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory, write_atomically

OWNER = "run.json"


class Owner(BaseModel):
    """What a run leaves in its folder of checkpoints.

    Attributes:
        run: its id.
        directory: of the run, when it left this.
        target: the folder, of which a copy has another name; None if an older farspan left this.
    """

    run: str
    directory: str
    target: str | None = None


def refuse_anothers(target: Target, run: RunDirectory) -> None:
    """Raise UserError if a folder is another run's, or nobody can say whose.

    It is that of the run that has claimed it, or in whose directory it lies. Checkpoints that are
    of none of these may be those of a run that has trained.
    """
    owner = _owner_of(target)
    if owner is None:
        _refuse_unclaimed(target, run)
        return
    other = RunDirectory(Path(owner.directory))
    if owner.run != _id_of(run):
        whose = "an earlier run in" if other.root == run.root else "another run,"
        raise UserError(
            f"checkpoint.dir = {target} has the checkpoints of {whose} {other.root}: {run.root} "
            "would go on from its weights, and remove its checkpoints. Name another "
            f"checkpoint.dir; or, if that run is gone for good, remove {target} to begin anew, or "
            f"write {owner.run} to {run.id} to go on from them"
        )
    if owner.target in (None, target.url) and _is_copy(run, other):
        raise UserError(
            f"checkpoint.dir = {target} has the checkpoints of another run, {other.root}: "
            f"{run.root}, a copy of it or its original, would go on from them, and remove them. "
            "Name another checkpoint.dir: a copy of that folder to go on from its checkpoints"
        )


def claim(target: Target, run: RunDirectory, check: Callable[[], None]) -> None:
    """Let a folder have the checkpoints of this run, and of no other.

    Args:
        check: raises if nothing may be changed there.

    Raises:
        UserError: as `refuse_anothers`.
    """
    refuse_anothers(target, run)
    if not run.id.exists():
        write_atomically(run.id, f"{secrets.token_hex(8)}\n")
    owner = Owner(run=run.id.read_text().strip(), directory=str(run.root), target=target.url)
    if _owner_of(target) != owner:
        target.make()
        (target / OWNER).commit(f"{owner.model_dump_json()}\n".encode(), check)
        # The last of two that claim it at once has it, on any file system.
        refuse_anothers(target, run)


def _refuse_unclaimed(target: Target, run: RunDirectory) -> None:
    other = RunDirectory(Path(target.url).parent)
    if target.url == str(other.checkpoints) and other.config.exists() and other.root != run.root:
        raise UserError(
            f"checkpoint.dir = {target} is where another run, {other.root}, saves: {run.root} "
            "would go on from its weights, and remove its checkpoints. Name another checkpoint.dir"
        )
    if run.ledger.exists() or run.imported.exists():
        return
    if steps := saved_steps(target):
        raise UserError(
            f"checkpoint.dir = {target} has a checkpoint of step {steps[-1]}, and no {OWNER} says "
            f"of which run: {run.root} has not trained yet, and would go on from its weights, and "
            f"remove what is there. Name another checkpoint.dir, or remove {target} to begin anew"
        )


def _owner_of(target: Target) -> Owner | None:
    place = target / OWNER
    if not place.exists():
        return None
    try:
        return Owner.model_validate_json(place.read())
    except ValidationError as error:
        what = error.errors()[0]["msg"]
        raise UserError(
            f"{place} does not say whose checkpoints lie there ({what}): name another "
            "checkpoint.dir, or remove that file if they are those of this run"
        ) from None


def _id_of(run: RunDirectory) -> str | None:
    """None before its first claim; a directory that is renamed keeps it, and so does a copy."""
    return run.id.read_text().strip() if run.id.exists() else None


def _is_copy(run: RunDirectory, other: RunDirectory) -> bool:
    """Whether there are both, and one is a copy of the other."""
    if not other.id.exists() or other.root.samefile(run.root):
        return False
    return _id_of(other) == _id_of(run)
