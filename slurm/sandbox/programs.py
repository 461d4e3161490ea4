"""Where Slurm's programs are."""

import os
import shutil
from collections.abc import Iterable

# Debian and Ubuntu install daemons there, which not every PATH has.
_SYSTEM = "/usr/local/sbin:/usr/sbin:/sbin"
CLUSTER = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
# For host names and networks of nodes.
NAMESPACES = ("unshare", "nsenter", "ip")
INSTALL = "apt-get install slurmctld slurmd slurm-client munge iproute2"


def find(name: str) -> str | None:
    """The path of a program, daemons included."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM}")


def missing(names: Iterable[str] = CLUSTER) -> list[str]:
    """Which of the programs this machine lacks."""
    return [name for name in names if not find(name)]


def require(name: str, install: str = INSTALL) -> str:
    """
    Raises:
        ValueError: it is not installed; the text says how it is, on Debian or Ubuntu.
    """
    found = find(name)
    if found is None:
        raise ValueError(f"{name} is not installed on this machine; on Debian, Ubuntu: {install}")
    return found
