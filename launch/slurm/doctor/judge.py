"""What is made of the measurements of a job."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.slurm.client import NodeInfo
from launch.slurm.doctor import (
    adapters,
    bandwidth,
    disk,
    gpus,
    names,
    network,
    shared_folder,
    versions,
)
from launch.slurm.doctor.bandwidth import Bandwidth
from launch.slurm.doctor.findings import Check, Finding, listed
from launch.slurm.doctor.node import SIGNAL_S, Folder, Meeting, OfNode, OfRank
from launch.slurm.profile import Profile


def judge(folder: Folder, profile: Profile, nodes: Sequence[NodeInfo]) -> list[Check]:
    """Check what the ranks have measured.

    Args:
        nodes: what Slurm says of all nodes.
    """
    if not folder.meeting.exists():
        finding = Finding(
            "the job",
            f"it has measured nothing: {last_words(folder.job_log) or 'and said nothing'}",
            "see that this Python and farspan are there on the nodes as well: a file system that "
            "all nodes share, or modules or a container image in the profile",
        )
        return [Check("ranks", "none", (finding,))]
    meeting = Meeting.model_validate_json(folder.meeting.read_text())
    ranks = folder.measured()
    of_node = {one.node: one.of_node for one in ranks if one.of_node}
    checks = [_check_ranks(folder, meeting, ranks)]
    if of_node:
        checks += _check_nodes(folder, meeting, of_node, nodes)
        if profile.gpus != "none":
            # Ranks on CPUs send over TCP.
            ports = {node: one.adapters for node, one in of_node.items()}
            checks.append(adapters.check(ports, profile.network.hcas))
    by_node: dict[str, list[gpus.Gpus]] = {}
    for one in ranks:
        by_node.setdefault(one.node, []).append(one.gpus)
    checks.append(gpus.check(by_node, profile.gpus != "none"))
    checks.append(_check_bandwidth(folder, profile))
    return checks


def _check_ranks(folder: Folder, meeting: Meeting, ranks: Sequence[OfRank]) -> Check:
    """Whether each node has measured anything."""
    there = {one.rank for one in ranks}
    findings, total = [], 0
    for node, tasks in zip(meeting.addresses, meeting.tasks, strict=True):
        missing = sorted({*range(total, total + tasks)} - there)
        total += tasks
        if missing:
            said = last_words(folder.log("node"), missing[0]) or last_words(folder.job_log)
            findings.append(
                Finding(
                    node,
                    f"rank {listed(map(str, missing))} could not measure: {said or 'no word'}",
                    f"see {folder.log('node')}: the node must have this Python, farspan and "
                    f"{folder.root}, as the others do",
                )
            )
    saw = f"{len(there)} of {total} ranks on {listed(meeting.addresses)}"
    return Check("ranks", saw, tuple(findings))


def _check_nodes(
    folder: Folder, meeting: Meeting, of_node: Mapping[str, OfNode], infos: Sequence[NodeInfo]
) -> list[Check]:
    slurmd = {info.name: info.version for info in infos}
    first = next(iter(meeting.addresses))
    taken = {node: one.taken for node, one in of_node.items() if one.taken}
    reached = {node: one.reached for node, one in of_node.items()}
    return [
        names.check(
            {node: one.names for node, one in of_node.items()},
            meeting.addresses,
            meeting.interface,
        ),
        network.check_ports(reached, taken),
        network.check_clocks(reached, first),
        versions.check(
            {node: one.versions | {"slurmd": slurmd[node]} for node, one in of_node.items()}
        ),
        disk.check({node: one.disks for node, one in of_node.items()}),
        shared_folder.check({node: one.seen for node, one in of_node.items()}, folder.root),
        _check_signals(of_node, folder.ready.exists()),
    ]


def _check_signals(of_node: Mapping[str, OfNode], were_sent: bool) -> Check:
    deaf = [node for node, one in of_node.items() if not one.signalled]
    if not were_sent:
        return Check("signals", "not sent, as not all ranks had started")
    finding = Finding(
        listed(deaf),
        f"the request to save and stop (USR2) has not come within {SIGNAL_S:.0f} s",
        "a job there would lose what it did since its last checkpoint when its time is up: have "
        "it looked at why scancel --signal does not reach the tasks of a step (slurmd's log)",
    )
    heard = len(of_node) - len(deaf)
    saw = f"the request to stop came to {heard} of {len(of_node)} nodes"
    return Check("signals", saw, (finding,) if deaf else ())


def _check_bandwidth(folder: Folder, profile: Profile) -> Check:
    if folder.unreachable.exists():
        return Check("all-reduce", "not measured, as not all nodes reach each other")
    measured = None
    if folder.bandwidth.exists():
        measured = Bandwidth.model_validate_json(folder.bandwidth.read_text())
    said = last_words(folder.log("bandwidth"))
    return bandwidth.check(measured, said, profile.network.all_reduce_gb_per_s)


def last_words(log: Path, rank: int | None = None) -> str:
    """The last line that says what went wrong, of all ranks or of one; empty if there is none."""
    if not log.exists():
        return ""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if rank is not None:
        lines = [line for line in lines if re.match(rf"\s*{rank}: ", line)]
    telling = [line for line in lines if re.search(r"\w(Error|Exception)\b|error:", line)]
    last = (telling or lines)[-1:]
    return " ".join(" ".join(last).split())
