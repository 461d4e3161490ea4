"""What sbatch is told of a job: a list of arguments, made of a site's profile and the request."""

from collections.abc import Sequence
from pathlib import Path

from launch.slurm.profile import Profile

# In the run directory. A path of the user's own could have a % in it, which Slurm replaces.
LOG = "slurm-%j.log"
EXCLUDE = "--exclude="
# SBATCH_NO_REQUEUE in the environment beats what the batch script says, and this beats both.
REQUEUE = "--requeue"


def sbatch_options(
    profile: Profile,
    *,
    name: str,
    nodes: int,
    folder: Path,
    time: str | None = None,
    dependency: str | None = None,
    exclude: Sequence[str] = (),
) -> list[str]:
    """The options of one job.

    Args:
        profile: without `auto`.
        folder: where it runs, and where its log goes.
        dependency: as sbatch takes it.
        exclude: nodes that it must not run on.
    """
    options = {
        "job-name": name,
        "chdir": str(folder),
        "output": LOG,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "reservation": profile.reservation,
        "time": time or profile.time,
        "nodes": nodes,
        "ntasks-per-node": profile.ranks_per_node,
        "cpus-per-task": None if profile.cpus_per_rank == "auto" else profile.cpus_per_rank,
        **gpu_options(profile),
        "mem": profile.memory,
        "signal": f"USR2@{profile.stop_before_s}",
        "dependency": dependency,
        # Of two options sbatch takes the last.
        "exclude": ",".join([*excluded_by(profile), *exclude]) or None,
    }
    listed = [f"--{option}={value}" for option, value in options.items() if value is not None]
    listed += [REQUEUE, *(["--exclusive"] if profile.exclusive else [])]
    # A job that waits for one that has failed would wait for ever.
    listed += ["--kill-on-invalid-dep=yes"] if dependency else []
    return [*listed, *(one for one in profile.options if not one.startswith(EXCLUDE))]


def excluded_by(profile: Profile) -> list[str]:
    """Nodes that no job of the site is to run on, in lists as Slurm takes them."""
    return [one.removeprefix(EXCLUDE) for one in profile.options if one.startswith(EXCLUDE)]


def gpu_options(profile: Profile) -> dict[str, str]:
    """How this site wants to be asked for a GPU for each rank."""
    kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
    match profile.gpus:
        case "gpus-per-node":
            return {"gpus-per-node": f"{kind}{profile.ranks_per_node}"}
        case "gpus-per-task":
            return {"gpus-per-task": f"{kind}1"}
        case "gres":
            return {"gres": f"gpu:{kind}{profile.ranks_per_node}"}
    return {}
