"""What Slurm says on the login node: its version, the partition, limits, requeueing, GPUs."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.slurm.client import NodeInfo, PartitionInfo, limit_s
from launch.slurm.doctor.findings import Check, Finding, listed
from launch.slurm.profile import Profile, seconds_of

# The first whose steps share a job's nodes as those of today do (srun --overlap, --exact).
OLDEST = (20, 11)
# At the end of its time limit a job needs some to save, and some to train before.
SHARE_FOR_SAVING = 0.5
IN_THE_PROFILE = "in the profile"


@dataclass(frozen=True)
class Site:
    """What a profile meets.

    Attributes:
        config: `scontrol show config`.
        partition: the one that the profile names or means; None if there is none.
        nodes: of that partition.
        environment: of the user.
    """

    profile: Profile
    config: Mapping[str, str]
    partitions: Sequence[PartitionInfo]
    all_nodes: Sequence[NodeInfo]
    environment: Mapping[str, str]

    @property
    def partition(self) -> PartitionInfo | None:
        wish = self.profile.partition
        for one in self.partitions:
            if one.name == wish or (wish is None and one.is_default):
                return one
        return None

    @property
    def nodes(self) -> list[NodeInfo]:
        if self.partition is None:
            return []
        names = set(self.partition.nodes)
        return [node for node in self.all_nodes if node.name in names]


def check_settings(site: Site, wanted: int) -> list[Check]:
    """
    Args:
        wanted: how many nodes the job is to have.
    """
    return [
        _version(site),
        _partition(site, wanted),
        _time_limits(site),
        _requeue(site),
        _gpus(site),
    ]


def _version(site: Site) -> Check:
    version = site.config.get("SLURM_VERSION", "unknown")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    finding = Finding(
        "this cluster",
        f"Slurm {version} is older than {'.'.join(map(str, OLDEST))}",
        "have it updated: srun starts ranks in another way there, which farspan was not tried with",
    )
    return Check("Slurm", version, (finding,) if numbers < OLDEST else ())


def _partition(site: Site, wanted: int) -> Check:
    names = [one.name for one in site.partitions]
    wish, partition = site.profile.partition, site.partition
    if partition is None:
        close = difflib.get_close_matches(wish or "", names, n=1)
        near = f", did you mean {close[0]}?" if close else ""
        what = f"no partition has this name{near}" if wish else "no partition is the default one"
        fix = f"partition {IN_THE_PROFILE}: one of {listed(names) or 'none: you may see none'}"
        return Check("partition", "none", (Finding(wish or "this cluster", what, fix),))
    findings = []
    if partition.state != "UP":
        what = f"its state is {partition.state}: no job starts there"
        fix = f"name another one {IN_THE_PROFILE} ({listed(names)}), or wait until it is up"
        findings.append(Finding(partition.name, what, fix))
    if partition.max_nodes is not None and partition.max_nodes < wanted:
        what = f"a job may have {partition.max_nodes} nodes, {wanted} are asked for"
        fix = f"--nodes {partition.max_nodes}; or a QOS that lifts it ({IN_THE_PROFILE})"
        findings.append(Finding(partition.name, what, fix))
    usable = [node for node in site.nodes if node.is_usable]
    if len(usable) < wanted:
        findings.append(_too_few(partition.name, site.nodes, wanted))
    saw = f"{partition.name}: {len(usable)} of {len(site.nodes)} nodes usable"
    return Check("partition", saw, tuple(findings))


def _too_few(partition: str, nodes: Sequence[NodeInfo], wanted: int) -> Finding:
    lost = [node for node in nodes if not node.is_usable]
    reasons = {node.name: node.reason or "+".join((node.state, *node.flags)) for node in lost}
    why = "".join(f"; {name}: {reason}" for name, reason in list(reasons.items())[:3])
    usable = len(nodes) - len(lost)
    return Finding(
        partition,
        f"{wanted} nodes are asked for, of {len(nodes)} there {usable} are usable{why}",
        f"--nodes {usable}, or have the others brought back (scontrol update state=resume)"
        if usable
        else "have them brought back (scontrol update state=resume), or name another partition",
    )


def _time_limits(site: Site) -> Check:
    partition, profile = site.partition, site.profile
    most = partition.max_time_s if partition else None
    wish = seconds_of(profile.time) if profile.time else None
    default = partition.default_time_s if partition else None
    limit = wish or default or most
    findings = []
    where = partition.name if partition else ""
    if wish is not None and most is not None and wish > most:
        what = f"a job may take {_time(most)}, the profile asks for {_time(wish)}"
        fix = f"time {IN_THE_PROFILE}: at most that; a longer run goes on in further jobs by itself"
        findings.append(Finding(where, what, fix))
    if limit is not None and profile.stop_before_s > SHARE_FOR_SAVING * limit:
        what = (
            f"of a limit of {_time(limit)}, {_time(profile.stop_before_s)} are kept for saving: "
            "a job would hardly train"
        )
        fix = f"more time, or a smaller stop_before_s, {IN_THE_PROFILE}"
        findings.append(Finding(where, what, fix))
    grace = limit_s(site.config.get("KillWait")) or site.config.get("KillWait", "unknown")
    saw = f"a job may take {_time(most)}; KillWait {grace}"
    return Check("time limits", saw, tuple(findings))


def _requeue(site: Site) -> Check:
    findings = []
    if site.config.get("JobRequeue") == "0":
        what = "JobRequeue=0: after a node has failed, or another job has taken its nodes, Slurm "
        what += "starts only those jobs again that were submitted with --requeue"
        fix = "farspan's batch scripts say --requeue; say so in yours, or ask for JobRequeue=1"
        findings.append(Finding("slurm.conf", what, fix))
    refusing = [name for name in ("SBATCH_NO_REQUEUE",) if name in site.environment]
    refusing += [one for one in site.profile.options if one == "--no-requeue"]
    for one in refusing:
        what = f"{one} forbids Slurm to start a job again, and farspan to requeue it"
        place = "the profile's options" if one.startswith("--") else "your environment"
        findings.append(Finding(place, what, f"remove it from {place}"))
    mode = site.partition.preempt_mode if site.partition else ""
    if "CANCEL" in mode.split(","):
        what = "PreemptMode=CANCEL: a job whose nodes another one takes is ended, not requeued"
        fix = f"another partition or QOS {IN_THE_PROFILE}, or `farspan launch resubmit RUN` then"
        findings.append(Finding(site.partition.name if site.partition else "", what, fix))
    shown = f"JobRequeue={site.config.get('JobRequeue', 'unknown')}"
    return Check("requeue", f"{shown}, PreemptMode={mode or 'unknown'}", tuple(findings))


def _gpus(site: Site) -> Check:
    profile, nodes = site.profile, site.nodes
    counts = sorted({node.gpus for node in nodes})
    types = sorted({kind for node in nodes for kind in node.gpu_types})
    shown = " or ".join(map(str, counts)) or "no"
    offer = f"{shown} GPUs a node{f' ({listed(types)})' if types else ''}"
    if profile.gpus in ("none", "auto") or not nodes:
        return Check("GPU flag", f"{profile.gpus}; {offer}")
    where = site.partition.name if site.partition else ""
    findings = []
    most = max(counts)
    if not most:
        what = f"gpus: {profile.gpus}, and Slurm knows of no GPU of its nodes (Gres)"
        fix = f"gpus: none {IN_THE_PROFILE}, or another partition, or have Gres=gpu configured"
        findings.append(Finding(where, what, fix))
    elif profile.gpu_type and profile.gpu_type not in types:
        known = listed(types) or "none: Slurm does not tell them apart"
        what = f"no node has GPUs of type {profile.gpu_type}"
        fix = f"gpu_type {IN_THE_PROFILE}: {known if types else 'leave it out'}"
        findings.append(Finding(where, f"{what}; types there: {known}", fix))
    elif isinstance(profile.ranks_per_node, int) and profile.ranks_per_node > most:
        what = f"{profile.ranks_per_node} ranks a node, each with a GPU, and {most} GPUs at most"
        findings.append(Finding(where, what, f"ranks_per_node: {most} {IN_THE_PROFILE}"))
    select = site.config.get("SelectType", "")
    if profile.gpus.startswith("gpus-per") and select and select != "select/cons_tres":
        what = f"{select} does not know --{profile.gpus}"
        findings.append(Finding("slurm.conf", what, f"gpus: gres {IN_THE_PROFILE}"))
    return Check("GPU flag", f"{profile.gpus}; {offer}", tuple(findings))


def _time(seconds: int | None) -> str:
    if seconds is None:
        return "any time"
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d} h" if hours else f"{seconds / 60:g} min"


def check_refusal(refusal: str, options: Sequence[str]) -> Check:
    """
    Args:
        refusal: what `sbatch --test-only` has said against the job; empty if nothing.
        options: it was given.
    """
    if not refusal:
        return Check("sbatch", "would take the job")
    fix = next(
        (fix for words, fix in FIXES.items() if words in refusal.lower()),
        f"change what it names {IN_THE_PROFILE}; the options were {' '.join(options)}",
    )
    return Check("sbatch", "refuses the job", (Finding("sbatch", refusal, fix),))


# By what sbatch says (slurm_errno.c).
FIXES = {
    "invalid account": f"account {IN_THE_PROFILE}: one of `sacctmgr show assoc user=$USER`",
    "invalid qos": f"qos {IN_THE_PROFILE}: one of `sacctmgr show assoc user=$USER format=qos`",
    "partition": f"partition {IN_THE_PROFILE}: one of `sinfo`",
    "generic resource": f"gpus and gpu_type {IN_THE_PROFILE}: as in Gres of `scontrol show node`",
    "gres": f"gpus and gpu_type {IN_THE_PROFILE}: as in Gres of `scontrol show node`",
    "node configuration": f"less of what a node has {IN_THE_PROFILE}: gpus, gpu_type, "
    "ranks_per_node, cpus_per_rank, memory (`scontrol show node` has them)",
    "feature": f"constraint {IN_THE_PROFILE}: as in Features of `scontrol show node`",
    "reservation": f"reservation {IN_THE_PROFILE}: one of `scontrol show reservation`",
    "time limit": f"time {IN_THE_PROFILE}: at most the partition's (`sinfo --format=%P,%l`)",
}


def check_job(fields: Mapping[str, str]) -> Check:
    """Whether Slurm would start the doctor's own job again, which was submitted with --requeue.

    Args:
        fields: `scontrol show job`.
    """
    finding = Finding(
        "this cluster",
        "a job submitted with --requeue may not be requeued (Requeue=0): a failed node ends it",
        "ask the administrators for a partition, QOS or submit plugin that lets jobs requeue",
    )
    requeue = fields.get("Requeue", "unknown")
    return Check("requeue of a job", f"Requeue={requeue}", (finding,) if requeue == "0" else ())
