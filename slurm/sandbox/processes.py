"""The processes of a sandbox: daemons, job steps and what jobs have started."""

import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from slurm.sandbox.configuration import mark_of

DEADLINE_S = 60


def start_daemon(
    folder: Path, name: str, command: list[str], environment: dict[str, str] | None = None
) -> None:
    """Start a process that outlives this one and is found by its mark."""
    variable, _, value = f"{mark_of(folder)}/{name}".partition("=")
    with (folder / "log" / f"{name}.out").open("ab") as printed:
        subprocess.run(
            ["setsid", "--fork", *command],
            env={**client_environment(folder), **(environment or {}), variable: value},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            check=True,
        )


def client_environment(folder: Path) -> dict[str, str]:
    """The environment in which Slurm's commands reach the sandbox, also from within another job."""
    foreign = re.compile("(SLURM|SBATCH|SRUN|SALLOC|SQUEUE|SINFO|SCANCEL)_")
    kept = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    return kept | {"SLURM_CONF": f"{folder}/slurm.conf"}


def processes(folder: Path, name: str | None = None) -> list[int]:
    """The ids of all processes of the sandbox, or of those of a node or daemon.

    Found are those with the mark in their environment (tasks have it from the task prolog), steps
    of jobs by the log of their node, as slurmstepd overwrites its environment, and all descendants.
    """
    parents: dict[int, int] = {}
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if state == "Z":
                continue
            parents[int(entry.name)] = int(parent)
            if _belongs(entry, folder, name):
                found.add(int(entry.name))
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {os.getpid(), os.getppid()})


def _belongs(process: Path, folder: Path, name: str | None) -> bool:
    mark = os.fsencode(f"{mark_of(folder)}/{name or ''}")
    variables = (process / "environ").read_bytes().split(b"\0")
    if any(one == mark or (name is None and one.startswith(mark)) for one in variables):
        return True
    if "slurmstepd" not in os.readlink(process / "exe"):
        return False
    logs = folder / "log"
    opened = [Path(os.readlink(file)) for file in (process / "fd").iterdir()]
    return any(file.parent == logs and name in (None, file.stem) for file in opened)


def kill(folder: Path, name: str | None = None) -> None:
    """Kill all at once, as when a machine loses power.

    Raises:
        TimeoutError: some are still there after a minute.
    """
    deadline = time.monotonic() + DEADLINE_S
    while alive := processes(folder, name):
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {alive} of {folder} do not die")
        # Stopped first, so that none can tell of the death of another.
        for sent in (signal.SIGSTOP, signal.SIGKILL):
            for pid in alive:
                with suppress(ProcessLookupError):
                    os.kill(pid, sent)
        time.sleep(0.05)
