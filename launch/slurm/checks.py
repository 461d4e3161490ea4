"""What can be wrong with a job before it is submitted, each with what would be right."""

import difflib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.sample import cache_folder
from launch.slurm.client import NodeInfo, PartitionInfo, Slurm
from launch.slurm.file_systems import folders_of, node_folders_of, require_shared
from launch.slurm.profile import Profile, seconds_of
from pretrain.config import Config
from pretrain.data_config import SAMPLE_SHARDS
from pretrain.engines.choice import check_engines, check_installed
from pretrain.errors import UserError

# How early Slurm may send a signal that it was told to send before a time limit.
EARLY_S = 60
NAME_LENGTH = 200
# What separates the mounts of a container. apptainer splits them at ^ as well; pyxis hands them to
# a shell of enroot's, before 0.24 with their spaces.
NO_PART_OF_A_MOUNT = {"apptainer": r"[,:^\\]", "pyxis": r"[,:\\\s\"$`]"}


@dataclass
class Checks:
    """What holds of a job, and what is wrong with it.

    Attributes:
        waits: whether nodes have to come back before it can start.
    """

    holds: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    waits: bool = False

    def __str__(self) -> str:
        lines = [f"ok       {line}" for line in self.holds]
        return "\n".join(lines + [f"refused  {problem}" for problem in self.problems])


def check_job(
    slurm: Slurm,
    profile: Profile,
    config: Config,
    *,
    name: str,
    nodes: int,
    time: str | None,
    directory: Path,
) -> tuple[Profile, Checks]:
    """Check a job against the cluster, and its layout against the nodes.

    Returns:
        The profile without `auto`, and what was found; nothing is submitted if there are problems.

    Raises:
        UserError: the partition does not exist, so that nothing can be checked.
        SlurmError: Slurm does not answer.
    """
    checks = Checks()
    partition = partition_of(slurm.partitions(), profile)
    members = [node for node in slurm.nodes() if partition.name in node.partitions]
    profile = resolve(profile, members)
    found = (
        problem_of_name(name),
        problem_of_path(directory),
        problem_of_partition(partition),
        problem_of_nodes(partition, members, profile, nodes),
        problem_of_time(partition, profile, time),
        *problems_of_access(partition, profile),
        *problems_of_container(profile),
        problem_of_engine(config, profile),
    )
    checks.problems += [problem for problem in found if problem]
    usable = sum(node.is_usable for node in _with_features(members, profile.constraint))
    checks.waits = usable < nodes
    checks.holds.append(_describe(partition, len(members), usable, profile, nodes))
    for check in (
        lambda: layout_of(config, nodes, profile.ranks_per_node),
        lambda: _folders(config, directory, profile),
    ):
        try:
            checks.holds.append(check())
        except UserError as error:
            checks.problems.append(str(error))
    return profile, checks


def partition_of(partitions: Sequence[PartitionInfo], profile: Profile) -> PartitionInfo:
    """The partition that a job goes to. Raises UserError: there is none."""
    asked = profile.partition or os.environ.get("SBATCH_PARTITION")
    names = [partition.name for partition in partitions]
    for partition in partitions:
        if partition.name == asked or (not asked and partition.is_default):
            return partition
    if not asked:
        raise UserError(
            "this cluster has no default partition: name one in a profile, as in `partition: "
            f"{names[0] if names else 'gpu'}`; there are: {', '.join(names)}"
        )
    near = difflib.get_close_matches(asked, names, n=1)
    raise UserError(
        f"partition {asked!r} is not known{f', did you mean {near[0]}?' if near else ''}; this "
        f"cluster has: {', '.join(names)}"
    )


def resolve(profile: Profile, nodes: Sequence[NodeInfo]) -> Profile:
    """The profile without `auto`, from what most nodes have that could be meant."""
    candidates = _with_features(nodes, profile.constraint)
    gpus = Counter(_gpus(node, profile) for node in candidates if _gpus(node, profile))
    most, _ = gpus.most_common(1)[0] if gpus and profile.gpus != "none" else (0, 0)
    update: dict[str, str | int] = {}
    if profile.gpus == "auto":
        update["gpus"] = "gpus-per-node" if most else "none"
    ranks = profile.ranks_per_node
    if ranks == "auto":
        update["ranks_per_node"] = ranks = most or 1
    if profile.cpus_per_rank == "auto":
        fitting = [node.cpus for node in candidates if not most or _gpus(node, profile) >= ranks]
        update["cpus_per_rank"] = max(1, min(fitting, default=1) // ranks)
    return profile.model_copy(update=update)


def problem_of_name(name: str) -> str | None:
    if "/" in name:
        return (
            f"name {name!r}: has a slash, which Slurm takes for a folder of the job's log, so that "
            f"the job ends without one: name it {name.replace('/', '-')!r}"
        )
    if not name.strip() or not name.isprintable() or len(name) > NAME_LENGTH:
        return (
            f"name {name!r}: must be one line of text, of {NAME_LENGTH} characters at most, as "
            "in --name first-run"
        )
    return None


def problem_of_path(directory: Path) -> str | None:
    """Slurm would look for the log of the job in another folder, and end it without one."""
    if not re.search(r"[%\\]", str(directory)):
        return None
    return (
        f"the run directory {directory}: has a % or a backslash, which Slurm replaces in the names "
        "of files: choose another path, as in --run-dir runs/first"
    )


def problem_of_partition(partition: PartitionInfo) -> str | None:
    if partition.state == "UP":
        return None
    return (
        f"partition {partition.name} is {partition.state}: its jobs do not start until the site "
        "sets it to UP; name another one in a profile"
    )


def problem_of_nodes(
    partition: PartitionInfo, members: Sequence[NodeInfo], profile: Profile, nodes: int
) -> str | None:
    """Why there will never be enough nodes that are big enough."""
    there = _with_features(members, profile.constraint)
    what = f"partition {partition.name}"
    if profile.constraint:
        what += f" with the features {profile.constraint}"
    fitting = that_fit(members, profile)
    at_most = min(len(fitting), partition.max_nodes or len(fitting))
    if nodes <= at_most:
        return None
    if not there:
        return f"{what} has no nodes: sinfo lists the nodes and features of every partition"
    if len(there) < nodes:
        return f"--nodes {nodes}: {what} has {len(there)}; at most --nodes {at_most}"
    if len(fitting) < nodes:
        example = next(node for node in there if _lacks(node, profile))
        return (
            f"--nodes {nodes}: of {what} {len(fitting)} of {len(there)} nodes are big enough: "
            f"{example.name} {_lacks(example, profile)}"
        )
    return f"--nodes {nodes}: {what} allows a job {partition.max_nodes}; at most --nodes {at_most}"


def that_fit(nodes: Sequence[NodeInfo], profile: Profile) -> list[NodeInfo]:
    """Nodes that have what a job needs, busy or not."""
    return [n for n in _with_features(nodes, profile.constraint) if not _lacks(n, profile)]


def _lacks(node: NodeInfo, profile: Profile) -> str | None:
    """What a node has too little of."""
    ranks, cpus = profile.ranks_per_node, profile.cpus_per_rank
    if ranks == "auto" or cpus == "auto":
        # Of a job that was submitted by hand nobody knows what it needs.
        return None
    if profile.gpus != "none" and _gpus(node, profile) < ranks:
        if not node.gpus:
            return "has no GPUs that Slurm knows of: set gpus: none to train on CPUs"
        if not _gpus(node, profile):
            kinds = ", ".join(node.gpu_types)
            return f"has GPUs of another type: set gpu_type to {kinds or 'null'}"
        return f"has {_gpus(node, profile)} GPUs: ranks_per_node can be so many, not {ranks}"
    if node.cpus < ranks * cpus:
        each = node.cpus // ranks
        return (
            f"has {node.cpus} CPUs, fewer than ranks_per_node x cpus_per_rank = {ranks} x {cpus}: "
            f"set cpus_per_rank to {each} at most"
            if each
            else f"has {node.cpus} CPUs: ranks_per_node can be so many, not {ranks}"
        )
    return None


def problem_of_time(partition: PartitionInfo, profile: Profile, time: str | None) -> str | None:
    asked = time or profile.time
    try:
        limit_s = seconds_of(asked) if asked else partition.default_time_s or partition.max_time_s
    except ValueError as error:
        return f"--time {asked}: {error}"
    if limit_s is None:
        return None
    if asked and partition.max_time_s and limit_s > partition.max_time_s:
        return (
            f"--time {asked}: partition {partition.name} allows {partition.max_time_s // 60} "
            "minutes; a run that takes longer goes on as the same job, requeued"
        )
    least_s = profile.stop_before_s + 2 * EARLY_S
    if limit_s < least_s:
        return (
            f"--time {asked or f'{limit_s // 60} (of the partition)'}: a job is asked to stop "
            f"{profile.stop_before_s} s before it (stop_before_s), and Slurm may do so {EARLY_S} s "
            f"earlier: give it {-(-least_s // 60)} minutes at least, or a profile with less of it"
        )
    return None


def problems_of_access(partition: PartitionInfo, profile: Profile) -> list[str]:
    """An account or QOS that the partition does not take."""
    problems = []
    for kind, asked, allowed, denied in (
        ("account", profile.account, partition.allowed_accounts, partition.denied_accounts),
        ("QOS", profile.qos, partition.allowed_qos, partition.denied_qos),
    ):
        if asked and allowed and asked not in allowed:
            near = difflib.get_close_matches(asked, allowed, n=1)
            problems.append(
                f"{kind} {asked!r}: partition {partition.name} takes "
                f"{', '.join(allowed)}{f', did you mean {near[0]}?' if near else ''}"
            )
        if asked and asked in denied:
            problems.append(f"{kind} {asked!r}: partition {partition.name} does not take it")
    return problems


def problems_of_container(profile: Profile) -> list[str]:
    container = profile.container
    if container.runtime == "none":
        return []
    if not container.image:
        return [f"container.runtime = {container.runtime}, but container.image is not set"]
    problems = []
    is_file = container.image.startswith(("/", ".")) and not Path(container.image).exists()
    if is_file:
        problems.append(f"container.image = {container.image}: no such file")
    return problems


def problem_of_engine(config: Config, profile: Profile) -> str | None:
    """What an engine needs is in the image of a container, and there out of sight."""
    if profile.container.runtime == "none":
        try:
            check_installed(config)
        except UserError as error:
            return str(error)
    return None


def layout_of(config: Config, nodes: int, ranks_per_node: int | str) -> str:
    assert isinstance(ranks_per_node, int)
    ranks = nodes * ranks_per_node
    try:
        layouts = dict.fromkeys(map(str, check_engines(config, ranks)))
    except UserError as error:
        raise UserError(f"{nodes} nodes x {ranks_per_node} ranks: {error}") from None
    return f"layout on {ranks} ranks: {', then '.join(layouts)}"


def _folders(config: Config, directory: Path, profile: Profile) -> str:
    """All that the nodes read and write has to be where they see it."""
    folders = {"the run directory": directory, **folders_of(config)}
    if SAMPLE_SHARDS in (source.path for source in config.data.sources()):
        folders["the sample's folder, FARSPAN_CACHE"] = cache_folder()
    kinds = {require_shared(what, path, profile) for what, path in folders.items()}
    refuse_mounts(folders | node_folders_of(config, profile.scratch), profile)
    return f"{', '.join(folders)} on {', '.join(sorted(kinds))}"


def refuse_mounts(folders: Mapping[str, Path], profile: Profile) -> None:
    """Raises UserError where a container could not be told which folder it is to see."""
    runtime = profile.container.runtime
    for what, path in folders.items() if runtime != "none" else ():
        if found := re.search(NO_PART_OF_A_MOUNT[runtime], str(path.resolve())):
            raise UserError(
                f"{what}, {path.resolve()}: has {found[0]!r}, which {runtime} does not take as "
                "part of a path: choose another one"
            )


def _describe(
    partition: PartitionInfo, members: int, usable: int, profile: Profile, nodes: int
) -> str:
    waits = "" if usable >= nodes else ": the job waits until enough of them are"
    gpus = "no GPUs" if profile.gpus == "none" else "a GPU"
    return (
        f"partition {partition.name}: {members} nodes, {usable} usable now{waits}; "
        f"{nodes} x {profile.ranks_per_node} ranks, each with {profile.cpus_per_rank} CPUs, {gpus}"
    )


def _with_features(nodes: Sequence[NodeInfo], constraint: str | None) -> list[NodeInfo]:
    """Nodes with all of several features; with more than a list of them it is Slurm that knows."""
    wanted = set((constraint or "").split("&")) - {""}
    if any(not re.fullmatch(r"[\w.:-]+", feature) for feature in wanted):
        return list(nodes)
    return [node for node in nodes if wanted <= set(node.features)]


def _gpus(node: NodeInfo, profile: Profile) -> int:
    is_other = profile.gpu_type and node.gpu_types and profile.gpu_type not in node.gpu_types
    return 0 if is_other else node.gpus
