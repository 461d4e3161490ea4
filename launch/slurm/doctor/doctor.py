"""`farspan launch doctor`: look at a cluster, and say what would make a job fail, wait or crawl."""

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

from launch.slurm.client import Slurm, SlurmError
from launch.slurm.doctor.findings import Check, Finding, listed
from launch.slurm.doctor.judge import judge
from launch.slurm.doctor.node import Folder, Request
from launch.slurm.doctor.settings import (
    Site,
    check_job,
    check_settings,
    refused_by_slurm,
    unknown_partition,
)
from launch.slurm.options import sbatch_options
from launch.slurm.plain_text import records
from launch.slurm.profile import load_profile
from pretrain.errors import UserError
from pretrain.run_dir import write_atomically

SCRIPT = Path(__file__).parents[3] / "slurm" / "doctor.sbatch"
# Ranks may take minutes to import torch from a shared file system, the first time.
LIMIT_S = 15 * 60
# What a job could not start with, or not write its measurements.
WITHOUT_THESE_NO_JOB = ("partition", "nodes", "directory")
POLL_S = 1.0


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
    profile, slurm = load_profile(asked.profile), Slurm()
    try:
        site = Site.of(profile, slurm.config(), slurm.partitions(), slurm.nodes())
    except UserError as error:
        _print([unknown_partition(error)], console)
        return False
    wanted = asked.nodes or max(1, min(2, site.usable()))
    directory = asked.directory.resolve()
    checks = check_settings(site, wanted, directory)
    if any(check.findings for check in checks if check.name in WITHOUT_THESE_NO_JOB):
        _print(checks, console)
        return False
    folder = _make_folder(directory)
    checks += _check_nodes(slurm, site, wanted, folder, asked.wait_s, console)
    _print(checks, console)
    if any(check.findings for check in checks):
        console.print(Text(f"measurements and logs: {folder.root}"), soft_wrap=True)
        return False
    shutil.rmtree(folder.root)
    return True


def _make_folder(directory: Path) -> Folder:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Hidden: it is none of the runs.
        return Folder(Path(tempfile.mkdtemp(prefix=".doctor-", dir=directory)))
    except OSError as error:
        raise UserError(
            f"--dir {directory}: {error.strerror}; name a folder on the shared file system, in "
            "which runs will lie"
        ) from None


def _check_nodes(
    slurm: Slurm, site: Site, wanted: int, folder: Folder, wait_s: float, console: Console
) -> list[Check]:
    """Run a job, if Slurm takes it, and check what its ranks have measured."""
    options = _options(site, wanted, folder)
    try:
        slurm.when_it_would_start(SCRIPT, options)
    except SlurmError as error:
        return [refused_by_slurm(str(error), options)]
    addresses = {node.name: node.address for node in site.nodes}
    request = Request(addresses=addresses, profile=site.profile)
    write_atomically(folder.request, request.model_dump_json() + "\n")
    job = slurm.submit(SCRIPT, options, [str(folder.root)], {"FARSPAN_PYTHON": sys.executable})
    try:
        fields = records(slurm.call("scontrol", "show", "job", job), "JobId")[0]
        requeue = check_job(site, fields)
        waited_for = _wait(slurm, job, wait_s, console)
    finally:
        slurm.cancel(job)
    if waited_for:
        return [requeue, _never_started(job, waited_for, wait_s)]
    return [requeue, *judge(folder, site.profile, site.nodes)]


def _options(site: Site, wanted: int, folder: Folder) -> list[str]:
    limit_s = min(LIMIT_S, site.partition.max_time_s or LIMIT_S)
    profile = site.profile.model_copy(update={"stop_before_s": 1})
    options = sbatch_options(
        profile,
        name="farspan-doctor",
        nodes=wanted,
        folder=folder.root,
        time=str(max(1, limit_s // 60)),
    )
    return [*options, f"--output={folder.job_log.name}"]


def _wait(slurm: Slurm, job: str, wait_s: float, console: Console) -> str:
    """Wait until the job has ended. If it does not start in time: what it waits for."""
    deadline, said = time.monotonic() + wait_s, ""
    while True:
        info = slurm.job(job)
        if info is None or info.is_over:
            return ""
        state = f"runs on {listed(info.nodes)}" if info.nodes else "waits"
        if not info.nodes and info.reason:
            state = f"waits: {info.reason}"
        if state != said:
            console.print(f"job {job} {state}", highlight=False, soft_wrap=True)
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
    return Check("queue", f"waited for {reason}", (finding,))


def _print(checks: Sequence[Check], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("check", "seen", "found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        count = len(check.findings)
        verdict = Text(f"{count} to mend" if count else "ok", "red" if count else "green")
        table.add_row(check.name, Text(check.saw), verdict)
    console.print(table)
    for check in checks:
        for finding in check.findings:
            what = Text.assemble("\n", (f"{check.name}, {finding.where}: ", "bold"), finding.what)
            console.print(what, soft_wrap=True)
            if finding.fix:
                console.print(Text(f"  to mend it: {finding.fix}"), soft_wrap=True)
    count = sum(len(check.findings) for check in checks)
    console.print(f"\n{count} found" if count else "nothing found that should be mended")
