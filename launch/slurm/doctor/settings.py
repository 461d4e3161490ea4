"""What Slurm says on the login node: its version, the partition, limits, requeueing, GPUs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.slurm.checks import (
    partition_of,
    problem_of_nodes,
    problem_of_partition,
    problem_of_time,
    problems_of_access,
    problems_of_container,
    resolve,
)
from launch.slurm.client import NodeInfo, PartitionInfo
from launch.slurm.doctor.findings import Check, Finding, listed
from launch.slurm.file_systems import require_shared
from launch.slurm.profile import Profile
from pretrain.errors import UserError

# The first whose steps share a job's nodes as those of today do (srun --overlap, --exact).
OLDEST = (20, 11)
REASONS_AT_MOST = 3
# Slurm's default; a batch script asks the controller, with a Python from the shared file system.
KILL_WAIT_S = 30


@dataclass(frozen=True)
class Site:
    """What a profile meets.

    Attributes:
        profile: without `auto`.
        config: `scontrol show config`.
        nodes: of the partition.
    """

    profile: Profile
    config: Mapping[str, str]
    partition: PartitionInfo
    nodes: Sequence[NodeInfo]

    @classmethod
    def of(
        cls,
        profile: Profile,
        config: Mapping[str, str],
        partitions: Sequence[PartitionInfo],
        nodes: Sequence[NodeInfo],
    ) -> "Site":
        """Raises UserError: the partition of the profile does not exist."""
        partition = partition_of(partitions, profile)
        members = [node for node in nodes if partition.name in node.partitions]
        return cls(resolve(profile, members), config, partition, members)

    def usable(self) -> int:
        return sum(node.is_usable for node in self.nodes)


def check_settings(site: Site, wanted: int, directory: Path) -> list[Check]:
    """
    Args:
        wanted: how many nodes the job is to have.
        directory: where runs will lie.
    """
    return [
        _version(site),
        _partition(site),
        _nodes(site, wanted),
        _time_limits(site),
        _requeue(site),
        _directory(site, directory),
    ]


def unknown_partition(error: UserError) -> Check:
    """Nothing more can be looked at then."""
    return Check("partition", "none", _told("the profile", [str(error)]))


def _told(where: str, problems: Iterable[str | None]) -> tuple[Finding, ...]:
    return tuple(Finding(where, problem) for problem in problems if problem)


def _version(site: Site) -> Check:
    version = site.config.get("SLURM_VERSION", "unknown")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    finding = Finding(
        "this cluster",
        f"Slurm {version} is older than {'.'.join(map(str, OLDEST))}",
        "have it updated: srun starts ranks in another way there, which farspan was not tried with",
    )
    return Check("Slurm", version, (finding,) if numbers < OLDEST else ())


def _partition(site: Site) -> Check:
    partition, profile = site.partition, site.profile
    problems = (
        problem_of_partition(partition),
        *problems_of_access(partition, profile),
        *problems_of_container(profile),
    )
    saw = f"{partition.name} is {partition.state}"
    return Check("partition", saw, _told(partition.name, problems))


def _nodes(site: Site, wanted: int) -> Check:
    partition, profile = site.partition, site.profile
    findings = _told(partition.name, [problem_of_nodes(partition, site.nodes, profile, wanted)])
    if not findings and site.usable() < wanted:
        findings = (_too_few(site, wanted),)
    select = site.config.get("SelectType", "")
    if profile.gpus.startswith("gpus-per") and select and select != "select/cons_tres":
        what = f"{select} does not know --{profile.gpus}"
        findings += (Finding("slurm.conf", what, "gpus: gres in the profile"),)
    gpus = sorted({node.gpus for node in site.nodes})
    each = f"{profile.ranks_per_node} ranks and {' or '.join(map(str, gpus)) or 'no'} GPUs each"
    saw = f"{site.usable()} of {len(site.nodes)} usable, {each} (gpus: {profile.gpus})"
    return Check("nodes", saw, findings)


def _too_few(site: Site, wanted: int) -> Finding:
    lost = [node for node in site.nodes if not node.is_usable]
    reasons = {node.name: node.reason or "+".join((node.state, *node.flags)) for node in lost}
    why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:REASONS_AT_MOST])
    usable = site.usable()
    back = "have the others brought back (scontrol update state=resume)"
    return Finding(
        listed(reasons),
        f"not usable, and {usable} others are fewer than the {wanted} asked for ({why})",
        f"--nodes {usable}, or {back}" if usable else back.replace("the others", "them"),
    )


def _time_limits(site: Site) -> Check:
    partition = site.partition
    problem = problem_of_time(partition, site.profile, None)
    most = "any time" if partition.max_time_s is None else f"{partition.max_time_s / 60:g} minutes"
    saw = f"a job may take {most}; KillWait {site.config.get('KillWait', 'unknown')}"
    return Check("time limits", saw, _told(partition.name, [problem]))


def _requeue(site: Site) -> Check:
    findings = []
    if site.config.get("JobRequeue") == "0":
        what = "JobRequeue=0: after a node has failed, or another job has taken its nodes, Slurm "
        what += "starts only those jobs again that were submitted with --requeue"
        fix = "farspan's batch scripts say --requeue; say so in yours, or ask for JobRequeue=1"
        findings.append(Finding("slurm.conf", what, fix))
    mode, left_s = site.partition.preempt_mode, site.config.get("KillWait", "").split()[:1]
    if "CANCEL" in mode.split(",") and left_s and int(left_s[0]) < KILL_WAIT_S:
        what = "PreemptMode=CANCEL: a job whose nodes another one takes is ended; its batch script "
        what += f"requeues it, for which KillWait leaves {left_s[0]} s, and that may be too little"
        fix = f"ask for KillWait={KILL_WAIT_S}, or another partition or QOS in the profile; after "
        fix += "too little `farspan launch resubmit RUN` goes on"
        findings.append(Finding(site.partition.name, what, fix))
    shown = f"JobRequeue={site.config.get('JobRequeue', 'unknown')}"
    return Check("requeue", f"{shown}, PreemptMode={mode or 'unknown'}", tuple(findings))


def _directory(site: Site, directory: Path) -> Check:
    try:
        kind = require_shared("--dir", directory, site.profile)
    except UserError as error:
        return Check("directory", str(directory), _told("this machine", [str(error)]))
    return Check("directory", f"{directory} is on {kind}")


def refused_by_slurm(refusal: str, options: Sequence[str]) -> Check:
    """
    Args:
        refusal: what `sbatch --test-only` has said against the job.
        options: it was given.
    """
    fix = next(
        (fix for words, fix in FIXES.items() if words in refusal.lower()),
        f"change what it names in the profile; the options were {' '.join(options)}",
    )
    return Check("sbatch", "refuses the job", (Finding("sbatch", refusal, fix),))


# By what sbatch says (slurm_errno.c).
FIXES = {
    "invalid account": "account in the profile: one of `sacctmgr show assoc user=$USER`",
    "invalid qos": "qos in the profile: one of `sacctmgr show assoc user=$USER format=qos`",
    "gres": "gpus and gpu_type in the profile: as in Gres of `scontrol show node`",
    "node configuration": "less of what a node has in the profile: gpus, gpu_type, "
    "ranks_per_node, cpus_per_rank, memory (`scontrol show node` has them)",
    "feature": "constraint in the profile: as in Features of `scontrol show node`",
    "reservation": "reservation in the profile: one of `scontrol show reservation`",
    "time limit": "time in the profile: at most the partition's (`sinfo --format=%P,%l`)",
}


def check_job(site: Site, fields: Mapping[str, str]) -> Check:
    """Whether Slurm would start the doctor's own job again, which was submitted with --requeue.

    Args:
        fields: `scontrol show job`.
    """
    requeue = fields.get("Requeue", "unknown")
    finding = Finding(
        site.partition.name,
        "a job submitted with --requeue may not be requeued (Requeue=0): a failed node ends it",
        "ask the administrators for a partition, QOS or submit plugin that lets jobs requeue",
    )
    return Check("job", f"Requeue={requeue}", (finding,) if requeue == "0" else ())
