"""The container that ranks run in: what srun is told of it, and what the command begins with."""

from collections.abc import Sequence

from launch.slurm.profile import Container, Profile


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
