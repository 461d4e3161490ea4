"""The folder of one data run: who works in it, and what was asked of it."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import IO, Any
from uuid import uuid4

from data_pipeline.errors import DataError

PLAN = "plan.json"
OUTPUTS = (
    "audit",
    "funnel.json",
    "manifest.json",
    "metrics.jsonl",
    "shards",
    "tokenizer.json",
    "work",
)


# `LocalStore.has_writer`, which `farspan status` and training on growing shards ask, holds the lock
# for a moment.
LOOK_S = 0.2
# In a plan, in place of a value that this process does not know; it differs from none.
UNKNOWN = "?"


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make the folder if need be, and hold it: one process at a time may change it.

    Raises:
        DataError: another process holds it, or what a run would replace there is no run's.
    """
    with _held(folder, fcntl.LOCK_EX):
        yield


@contextmanager
def shared(folder: Path) -> Iterator[None]:
    """Make the folder if need be, and hold it with others that do parts of one run.

    Raises:
        DataError: a process holds it for itself, or what a run would replace there is no run's.
    """
    with _held(folder, fcntl.LOCK_SH):
        yield


@contextmanager
def _held(folder: Path, kind: int) -> Iterator[None]:
    refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        if not _lock(file, kind):
            file.seek(0)
            holder = file.read().strip().splitlines() or ["another process"]
            raise DataError(f"{folder} is in use by {holder[-1]}: wait for it or stop it")
        if kind == fcntl.LOCK_EX:
            file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            if kind == fcntl.LOCK_EX:
                file.truncate(0)


def _lock(file: IO[str], kind: int) -> bool:
    """Lock it; false where another process holds it for longer than a look at it takes."""
    for is_last in (False, True):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if not is_last:
                sleep(LOOK_S)
        else:
            return True
    return False


def refuse_foreign(folder: Path, outputs: Sequence[str] = OUTPUTS) -> None:
    """Raise DataError if a folder has something that a run would replace, and is no run's."""
    # In this order: another process may be making the plan and, after it, the rest.
    foreign = [name for name in outputs if (folder / name).exists()]
    if foreign and not (folder / PLAN).exists():
        raise DataError(
            f"{folder}: holds {', '.join(foreign)} but no {PLAN}, so not a run that can be "
            "continued, and a new one would replace them; choose another --out"
        )


def check_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Refuse what `shared` and `record_plan` would refuse of the folder, and change nothing.

    Raises:
        DataError: as they do.
    """
    refuse_foreign(folder)
    if (folder / PLAN).exists():
        _checked(folder, json.loads(json.dumps(plan)))


def record_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or check that it is the one the folder was made by.

    Of several processes the first one writes it. Values that are UNKNOWN there are filled in.

    Raises:
        DataError: naming the first setting that differs, and how many more do.
    """
    path = folder / PLAN
    now = json.loads(json.dumps(plan))
    if _write_if_first(path, now):
        return
    before, known = _checked(folder, now)
    if known != before:
        with _aside(path, known) as written:
            written.rename(path)


def _checked(folder: Path, now: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The folder's plan, which does not differ, and the same with what is known now."""
    path = folder / PLAN
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: not the plan of a run ({error}); choose another --out") from error
    known = _fill_in(before, now)
    _refuse_changes(folder, dict(_leaves(known)), dict(_leaves(_fill_in(now, before))))
    return before, known


def _write_if_first(path: Path, plan: dict[str, Any]) -> bool:
    """Write a file that is there whole or not at all; return whether there was none."""
    if path.exists():
        return False
    with _aside(path, plan) as written:
        try:
            path.hardlink_to(written)
        except FileExistsError:
            return False
    return True


@contextmanager
def _aside(path: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """The plan in a file of another name, which is removed if it still has it."""
    aside = path.with_name(f".{path.name}.{uuid4().hex}")
    aside.write_text(json.dumps(plan, indent=1) + "\n")
    try:
        yield aside
    finally:
        aside.unlink(missing_ok=True)


def _fill_in(plan: Any, other: Any) -> Any:
    """A plan with what another one knows in place of what is UNKNOWN."""
    if plan == UNKNOWN:
        return other
    if isinstance(plan, dict) and isinstance(other, dict):
        return {key: _fill_in(value, other.get(key, value)) for key, value in plan.items()}
    return plan


def _refuse_changes(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changes = [
        f"{name}: {before.get(name, 'absent')!s:.80} -> {now.get(name, 'absent')!s:.80}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changes:
        more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
        raise DataError(
            f"{folder} holds a run of other inputs or options, {changes[0]}{more}: repeat those, "
            "choose another --out, or remove the folder"
        )


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree
