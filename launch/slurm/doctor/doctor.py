"""`farspan launch doctor`: look at a cluster, and say what would make a job fail, wait or crawl."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.slurm.client import NodeInfo, Slurm, SlurmError, records
from launch.slurm.doctor.findings import Check, Finding
from launch.slurm.doctor.judge import judge
from launch.slurm.doctor.node import Folder, Request
from launch.slurm.doctor.settings import Site, check_job, check_refusal, check_settings
from launch.slurm.options import sbatch_options
from launch.slurm.profile import Profile, load_profile
from pretrain.errors import UserError
from pretrain.run_dir import write_atomically

SCRIPT = Path(__file__).parents[3] / "slurm" / "doctor.sbatch"
# Ranks may take minutes to import torch from a shared file system, the first time.
LIMIT = "15"
POLL_S = 0.5


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Attributes:
        nodes: to look at (None: two, or the only one).
        directory: on the shared file system, where runs will lie.
        wait_s: for the job to start.
    """

    profile: str
    nodes: int | None
    directory: Path
    wait_s: float


def examine(asked: Asked, console: Console) -> bool:
    """Print what was looked at and what is wrong; whether nothing is.

    Raises:
        UserError: no such profile, no Slurm on this machine, a directory that cannot be had.
        SlurmError: the controller does not answer.
    """
    profile = load_profile(asked.profile)
    slurm = Slurm()
    site = Site(profile, slurm.config(), slurm.partitions(), slurm.nodes(), os.environ)
    usable = sum(node.is_usable for node in site.nodes)
    wanted = asked.nodes or max(1, min(2, usable))
    checks = check_settings(site, wanted)
    folder = _make_folder(asked.directory)
    if site.partition is not None:
        checks += _check_nodes(
            slurm, site, wanted, folder, asked.wait_s, bool(_found(checks)), console
        )
    _print(checks, console)
    findings = _found(checks)
    if findings:
        console.print(f"what was measured, and the logs: {folder.root}", soft_wrap=True)
    else:
        shutil.rmtree(folder.root)
    return not findings


def _make_folder(directory: Path) -> Folder:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Hidden: it is none of the runs.
        return Folder(Path(tempfile.mkdtemp(prefix=".doctor-", dir=directory.resolve())))
    except OSError as error:
        raise UserError(
            f"--dir {directory}: {error.strerror}; name a folder on the shared file system, in "
            "which runs will lie"
        ) from None


def _check_nodes(
    slurm: Slurm,
    site: Site,
    wanted: int,
    folder: Folder,
    wait_s: float,
    is_ill: bool,
    console: Console,
) -> list[Check]:
    """Run a job, if Slurm would take it, and check what its ranks have measured.

    Args:
        is_ill: whether there is something that explains a refusal.
    """
    profile = resolve(site.profile, site.nodes)
    options = _options(profile, wanted, folder)
    refusal = _refusal(slurm, options, folder)
    if refusal:
        return [] if is_ill else [check_refusal(refusal, options)]
    addresses = {node.name: node.address for node in site.nodes}
    request = Request(addresses=addresses, profile=profile)
    write_atomically(folder.request, request.model_dump_json() + "\n")
    job = slurm.submit(SCRIPT, options, [str(folder.root)], {"FARSPAN_PYTHON": sys.executable})
    try:
        waited_for = _wait(slurm, job, wait_s, console)
        fields = records(slurm.call("scontrol", "show", "job", job), "JobId")[0]
    finally:
        slurm.cancel(job)
    if waited_for:
        return [check_job(fields), _never_started(job, waited_for, wait_s)]
    return [check_job(fields), *judge(folder, profile, site.nodes)]


def resolve(profile: Profile, nodes: Sequence[NodeInfo]) -> Profile:
    gpus = min((node.gpus for node in nodes), default=0)
    way = profile.gpus
    if way == "auto":
        way = "gpus-per-node" if gpus else "none"
    ranks = profile.ranks_per_node
    if ranks == "auto":
        ranks = gpus or 1
    return profile.model_copy(update={"gpus": way, "ranks_per_node": ranks})


def _options(profile: Profile, wanted: int, folder: Folder) -> list[str]:
    short = profile.model_copy(update={"time": LIMIT, "stop_before_s": 1})
    options = sbatch_options(short, name="farspan-doctor", nodes=wanted, folder=folder.root)
    return [*options, f"--output={folder.job_log.name}"]


def _refusal(slurm: Slurm, options: Sequence[str], folder: Folder) -> str:
    """What Slurm has against the job; empty if it would take it."""
    try:
        slurm.call("sbatch", "--test-only", *options, str(SCRIPT), str(folder.root))
    except SlurmError as error:
        return str(error).removeprefix("sbatch: ")
    return ""


def _wait(slurm: Slurm, job: str, wait_s: float, console: Console) -> str:
    """Wait until the job has ended. If it does not start in time: what it waits for."""
    deadline, said = time.monotonic() + wait_s, ""
    while True:
        info = slurm.job(job)
        if info is None or info.is_over:
            return ""
        where = f"on {len(info.nodes)} nodes" if info.nodes else f"for {info.reason}"
        state = f"job {job} {'runs' if info.nodes else 'waits'} {where}"
        if state != said:
            console.print(state, highlight=False)
            said = state
        if info.state == "PENDING" and time.monotonic() > deadline:
            return info.reason or "nothing that Slurm would name"
        time.sleep(POLL_S)


def _never_started(job: str, reason: str, wait_s: float) -> Check:
    finding = Finding(
        "the queue",
        f"job {job} has not started within {wait_s / 60:g} minutes: it waited for {reason}",
        "fewer --nodes, more --wait, or a QOS or partition with more priority in the profile",
    )
    return Check("job", f"waited for {reason}", (finding,))


def _found(checks: Sequence[Check]) -> list[Finding]:
    return [finding for check in checks for finding in check.findings]


def _print(checks: Sequence[Check], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("check", "seen", "found"):
        table.add_column(column)
    for check in checks:
        count = len(check.findings)
        verdict = Text(f"{count} to mend" if count else "ok", "red" if count else "green")
        table.add_row(check.name, Text(check.saw), verdict)
    console.print(table)
    for check in checks:
        for finding in check.findings:
            what = Text.assemble("\n", (f"{check.name}, {finding.where}: ", "bold"), finding.what)
            console.print(what, soft_wrap=True)
            console.print(Text(f"  to mend it: {finding.fix}"), soft_wrap=True)
    count = len(_found(checks))
    console.print(f"\n{count} found" if count else "nothing found that should be mended")
