"""The container that ranks run in: what srun is told of it, and what the command begins with."""

from collections.abc import Sequence
from pathlib import Path

from launch.slurm.profile import Container, Profile

# What cannot be made is told as NODE: WHAT.
MAKE = 'mkdir -p -- "$@" 2>&1 | sed "s|^|$SLURMD_NODENAME: |"; exit "${PIPESTATUS[0]}"'


def before_container(container: Container, folders: Sequence[Path]) -> list[str]:
    """The command of each node before: a container shows only what is there when it starts.

    Args:
        folders: that the ranks write to, and would make themselves without a container.
    """
    if container.runtime == "none" or not folders:
        return []
    return ["bash", "-c", MAKE, "mkdir", *map(str, folders)]


def options_of_srun(container: Container, folders: Sequence[str]) -> list[str]:
    """With pyxis, srun starts the container.

    Args:
        folders: that the ranks read and write.
    """
    if container.runtime != "pyxis":
        return []
    assert container.image
    mounts = ",".join(_mounts(container, folders))
    return [f"--container-image={container.image}", f"--container-mounts={mounts}"]


def in_container(profile: Profile, folders: Sequence[str], command: Sequence[str]) -> list[str]:
    """With apptainer, the command does."""
    container = profile.container
    if container.runtime != "apptainer":
        return list(command)
    assert container.image
    binds = [f"--bind={mount}" for mount in _mounts(container, folders)]
    gpus = [] if profile.gpus == "none" else ["--nv"]
    return ["apptainer", "exec", *gpus, *binds, container.image, *command]


def _mounts(container: Container, folders: Sequence[str]) -> list[str]:
    chosen = [mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts]
    return list(dict.fromkeys([f"{folder}:{folder}" for folder in folders] + chosen))
