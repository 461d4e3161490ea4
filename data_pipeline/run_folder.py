"""The folder of one data run: who works in it, and what was asked of it."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError

PLAN = "plan.json"
OUTPUTS = ("audit", "manifest.json", "shards", "tokenizer.json", "work")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make the folder if need be, and hold it: one process at a time may change it.

    Raises:
        DataError: another process holds it, or what a run would replace there is no run's.
    """
    foreign = [name for name in OUTPUTS if (folder / name).exists()]
    if foreign and not (folder / PLAN).exists():
        raise DataError(
            f"{folder}: holds {', '.join(foreign)} but no {PLAN}, so not a run that can be "
            "continued, and a new one would replace them; choose another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise DataError(f"{folder} is in use by {holder}: wait for it or stop it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def record_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or check that it is the one the folder was made by.

    Raises:
        DataError: naming the first setting that differs, and how many more do.
    """
    path = folder / PLAN
    if not path.exists():
        aside = path.with_name(f".{path.name}")
        aside.write_text(json.dumps(plan, indent=1) + "\n")
        aside.rename(path)
        return
    try:
        before = dict(_leaves(json.loads(path.read_text())))
    except ValueError as error:
        raise DataError(f"{path}: not the plan of a run ({error}); choose another --out") from error
    now = dict(_leaves(json.loads(json.dumps(plan))))
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
