"""What can be wrong with the jobs of a data run before they are submitted."""

from collections.abc import Sequence
from pathlib import Path

from launch.data_run import DataRun
from launch.slurm.checks import (
    Checks,
    partition_of,
    problem_of_partition,
    problem_of_time,
    problems_of_access,
    problems_of_container,
    refuse_mounts,
)
from launch.slurm.client import NodeInfo, Slurm
from launch.slurm.file_systems import require_shared
from launch.slurm.profile import Profile
from pretrain.errors import UserError


def check_data_jobs(
    slurm: Slurm,
    profile: Profile,
    run: DataRun,
    out: Path,
    *,
    tasks: int,
    workers: int,
    time: str | None,
) -> Checks:
    """Check the jobs against the cluster.

    Args:
        tasks: of an array.
        workers: processors of each task.

    Raises:
        UserError: the partition does not exist, so that nothing can be checked.
        SlurmError: Slurm does not answer.
    """
    checks = Checks()
    partition = partition_of(slurm.partitions(), profile)
    members = [node for node in slurm.nodes() if partition.name in node.partitions]
    found = (
        problem_of_partition(partition),
        _problem_of_workers(workers, members, partition.name),
        _problem_of_tasks(tasks, slurm.config()),
        problem_of_time(partition, profile, time),
        *problems_of_access(partition, profile),
        *problems_of_container(profile),
    )
    checks.problems += [problem for problem in found if problem]
    usable = sum(node.is_usable for node in members)
    nodes = f"{len(members)} nodes, {usable} usable now"
    checks.holds.append(f"partition {partition.name}: {nodes}; {workers} CPUs a job")
    try:
        checks.holds.append(_folders(run, out, profile))
    except UserError as error:
        checks.problems.append(str(error))
    return checks


def _problem_of_workers(workers: int, members: Sequence[NodeInfo], partition: str) -> str | None:
    most = max((node.cpus for node in members), default=0)
    if workers <= most:
        return None
    return f"--workers {workers}: no node of partition {partition} has more than {most} CPUs"


def _problem_of_tasks(tasks: int, config: dict[str, str]) -> str | None:
    # Tasks are numbered from 1; the setting is what a number must be below.
    at_most = int(config.get("MaxArraySize", 1001)) - 1
    if tasks <= at_most:
        return None
    return (
        f"--tasks {tasks}: this cluster takes arrays of {at_most} at most (MaxArraySize - 1); with "
        f"--tasks {at_most} each of them has more archives"
    )


def _folders(run: DataRun, out: Path, profile: Profile) -> str:
    """All that the nodes read and write has to be where they see it."""
    if "\\" in str(out):
        raise UserError(
            f"--out {out}: has a backslash, which Slurm gives a meaning in the names of logs; "
            "choose another folder"
        )
    files = {"--tokenizer": run.tokenizer, "--classifier": run.classifier}
    folders = {"--out": out}
    folders |= {what: Path(name) for what, name in files.items() if name is not None}
    # A crawl of Common Crawl is named like a file that is not there.
    local = [name for name in run.inputs if "://" not in name and Path(name).exists()]
    folders |= {f"the input {name}": Path(name) for name in local}
    kinds = {require_shared(what, path, profile) for what, path in folders.items()}
    refuse_mounts(folders | {"the working directory": Path.cwd()}, profile)
    return f"{', '.join(folders)} on {', '.join(sorted(kinds))}"
