"""Slurm's own commands, called with lists of arguments and read from their plain text.

JSON needs a plugin, and sacct a database, that not every site has: neither is needed here.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from uuid import uuid4

from launch.slurm.plain_text import given, limit_s, moment, names_of, records
from pretrain.errors import UserError

TIMEOUT_S = 60.0
# Seconds before a controller that is busy is asked again: by a person, and by a job, to which it is
# worth minutes not to end because a controller was restarted.
PATIENCE_S = (1.0, 3.0, 9.0)
PATIENCE_OF_JOBS_S = (*PATIENCE_S, 30.0, 60.0, 120.0, 240.0)
IS_BUSY = re.compile(
    r"Unable to contact slurm controller|Socket timed out|Zero Bytes were transmitted|"
    r"Resource temporarily unavailable|Slurm temporarily unable|slurmctld is (?:busy|unavailable)|"
    r"Slurm controller not responding|connect failure",
    re.IGNORECASE,
)
# A variable of the job that this process is in would say of the new one what is not true of it. The
# others of Slurm's are how its commands find their cluster and prove who asks.
OF_A_JOB = re.compile(
    r"SLURM_(?!(?:CONF|CONF_SERVER|CLUSTERS|JWT|SACK_\w+)$)|SLURMD_|SRUN_|PMI|"
    r"SBATCH_(?:EXPORT|OUTPUT|ERROR)$"
)
# Of a job that farspan has submitted: a word that no other has, over all its requeues.
SUBMISSION = "FARSPAN_SUBMISSION"
OVER = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"),
    *("DEADLINE", "OUT_OF_MEMORY", "REVOKED"),
)


class SlurmError(Exception):
    """Slurm has refused something, or does not answer: told without a traceback."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class JobInfo:
    """What Slurm says of a job, or of a task of an array.

    Attributes:
        id: by which it is asked for; of a task ARRAY_TASK.
        state: such as PENDING, RUNNING, COMPLETING or those of `OVER`.
        reason: why it waits, in Slurm's word.
        nodes: where it runs or has run.
        excluded: where it must not run.
        restarts: how often it was requeued.
        time_limit_s: None without one.
        preempted: when a job of more importance has claimed its nodes.
        folder: where it works; "" where that is not known.
    """

    id: str
    name: str = ""
    user: str = ""
    partition: str = ""
    state: str = ""
    reason: str = ""
    dependency: str = ""
    nodes: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    restarts: int = 0
    exit_code: int = 0
    signal: int = 0
    time_limit_s: int | None = None
    submitted: datetime | None = None
    started: datetime | None = None
    ended: datetime | None = None
    preempted: datetime | None = None
    folder: str = ""
    array: str | None = None
    task: int | None = None

    @property
    def is_over(self) -> bool:
        return self.state in OVER


@dataclass(frozen=True, kw_only=True)
class NodeInfo:
    """What Slurm says of a node.

    Attributes:
        state: the first word, such as IDLE, MIXED, ALLOCATED or DOWN.
        flags: the others, such as DRAIN or NOT_RESPONDING.
        address: how Slurm reaches it.
        cpus: that jobs may have, as Slurm counts them: threads, at most sites.
        gpu_types: of its GPUs, as in h100; empty where Slurm does not tell them apart.
        started: when its slurmd did.
    """

    name: str
    state: str = ""
    flags: tuple[str, ...] = ()
    address: str = ""
    host: str = ""
    cpus: int = 0
    memory_mb: int = 0
    gpus: int = 0
    gpu_types: tuple[str, ...] = ()
    partitions: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    reason: str = ""
    version: str = ""
    booted: datetime | None = None
    started: datetime | None = None

    @property
    def has_failed(self) -> bool:
        return self.state in ("DOWN", "ERROR") or bool(
            {"NOT_RESPONDING", "FAIL", "INVALID_REG"} & set(self.flags)
        )

    @property
    def is_usable(self) -> bool:
        """Whether a job could start there, now or when others have ended."""
        ruled_out = {"DRAIN", "NOT_RESPONDING", "FAIL", "INVALID_REG", "MAINTENANCE"}
        return self.state in ("IDLE", "MIXED", "ALLOCATED") and not ruled_out & set(self.flags)


@dataclass(frozen=True, kw_only=True)
class PartitionInfo:
    """What Slurm says of a partition; None and empty: no restriction."""

    name: str
    is_default: bool = False
    state: str = ""
    nodes: tuple[str, ...] = ()
    max_nodes: int | None = None
    max_time_s: int | None = None
    default_time_s: int | None = None
    allowed_accounts: tuple[str, ...] = ()
    denied_accounts: tuple[str, ...] = ()
    allowed_qos: tuple[str, ...] = ()
    denied_qos: tuple[str, ...] = ()
    preempt_mode: str = ""
    fields: Mapping[str, str]


class Slurm:
    """The Slurm that this machine's commands talk to."""

    def __init__(
        self,
        environment: Mapping[str, str] | None = None,
        patience_s: Sequence[float] = PATIENCE_S,
    ) -> None:
        """
        Args:
            environment: of the commands (None: of this process).
            patience_s: seconds before a controller that is busy is asked again.

        Raises:
            UserError: this machine has none.
        """
        self._environment = dict(os.environ if environment is None else environment)
        self._patience_s = patience_s
        path = self._environment.get("PATH")
        missing = [name for name in ("sbatch", "scontrol") if not shutil.which(name, path=path)]
        if missing:
            raise UserError(
                f"no Slurm on this machine: {' and '.join(missing)} not found on PATH. Log in to "
                "the cluster's login node (or `module load slurm`), or stay on this machine: "
                "`farspan launch local RECIPE --nproc N`, `farspan data run` without --engine"
            )

    def submit(
        self,
        script: Path,
        options: Sequence[str],
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Submit a batch script and return the number of the job.

        Args:
            environment: variables that the job gets besides those of this process.

        Raises:
            SlurmError: Slurm refuses it, in its own words.
        """
        # By it a job is found that was taken although the answer was lost.
        token = f"farspan-{uuid4().hex}"
        command = ["sbatch", "--parsable", "--export=ALL", f"--comment={token}", *options]
        added = {SUBMISSION: token, **(environment or {})}
        for wait in (*self._patience_s, None):
            try:
                answer = self._call([*command, str(script), *arguments], added, patience_s=())
            except SlurmError as error:
                if job := self._with_comment(token) if IS_BUSY.search(str(error)) else None:
                    return job
                if wait is None or not IS_BUSY.search(str(error)):
                    raise
                time.sleep(wait)
            else:
                return answer.strip().partition(";")[0]
        raise AssertionError

    def when_it_would_start(self, script: Path, options: Sequence[str]) -> str:
        """When and where Slurm would start a script, in its own words; nothing is submitted.

        Raises:
            SlurmError: it would refuse it.
        """
        return _said(self._run(["sbatch", "--test-only", *options, str(script)]).stderr)

    def job(self, job: str) -> JobInfo | None:
        """What Slurm knows of a job; None where it has forgotten, or never heard of it."""
        return next(iter(self.jobs([job])), None)

    def jobs(self, jobs: Iterable[str]) -> list[JobInfo]:
        """What Slurm knows of these jobs, each task of an array by itself."""
        found: list[JobInfo] = []
        for job in jobs:
            try:
                text = self._call(["scontrol", "show", "job", job])
            except SlurmError as error:
                if "Invalid job id" not in str(error):
                    raise
                found += self._remembered(job)
            else:
                found += [self._job(fields) for fields in records(text, "JobId")]
        return found

    def cancel(self, job: str, signal: str | None = None) -> None:
        """End a job, or send its ranks a signal. One that is over already is no error."""
        command = ["scancel", *([f"--signal={signal}"] if signal else []), job]
        try:
            self._call(command)
        except SlurmError as error:
            if not re.search("Invalid job id|already completing or completed", str(error)):
                raise

    def requeue(self, job: str) -> None:
        """End a job and let it wait for another start. One that waits already is no error."""
        try:
            self._call(["scontrol", "requeue", job])
        except SlurmError as error:
            # As when it was asked again, after an answer that was lost.
            if "Job is pending execution" not in str(error):
                raise

    def avoid(self, job: str, nodes: Sequence[str]) -> None:
        """Keep a job that waits, or has just been requeued, from these nodes and no others."""
        self._call(["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}"])

    def nodes(self, names: str | None = None) -> list[NodeInfo]:
        """All nodes, or those of a list such as node[1-3]."""
        text = self._call(["scontrol", "show", "node", *([names] if names else [])])
        return [_node(fields) for fields in records(text, "NodeName")]

    def partitions(self) -> list[PartitionInfo]:
        """All partitions that this user may see."""
        text = self._call(["scontrol", "show", "partition"])
        return [self._partition(fields) for fields in records(text, "PartitionName")]

    def config(self) -> dict[str, str]:
        """The settings of the cluster, as in SlurmdTimeout."""
        text = self._call(["scontrol", "show", "config"])
        lines = (line.partition("=") for line in text.splitlines() if "=" in line)
        return {name.strip(): value.strip() for name, _, value in lines}

    def hostnames(self, nodes: str) -> tuple[str, ...]:
        """The names in a list such as node[1-3,7], in its order."""
        if not nodes or nodes == "(null)":
            return ()
        if "[" not in nodes:
            return tuple(nodes.split(","))
        return tuple(self._call(["scontrol", "show", "hostnames", nodes]).split())

    def call(self, *command: str) -> str:
        """Another command of Slurm's: what it prints. Raises SlurmError."""
        return self._call(command)

    def _job(self, fields: Mapping[str, str]) -> JobInfo:
        code, _, signal = fields.get("ExitCode", "0:0").partition(":")
        array, task = fields.get("ArrayJobId"), fields.get("ArrayTaskId", "")
        is_task = array is not None and task.isdigit()
        return JobInfo(
            id=f"{array}_{task}" if is_task else fields["JobId"],
            name=fields.get("JobName", ""),
            user=fields.get("UserId", "").partition("(")[0],
            partition=fields.get("Partition", ""),
            state=fields.get("JobState", ""),
            reason=given(fields.get("Reason")),
            dependency=given(fields.get("Dependency")),
            nodes=self.hostnames(fields.get("NodeList", "")),
            excluded=self.hostnames(fields.get("ExcNodeList", "")),
            restarts=int(fields.get("Restarts", 0)),
            exit_code=int(code),
            signal=int(signal or 0),
            time_limit_s=limit_s(fields.get("TimeLimit")),
            submitted=moment(fields.get("SubmitTime")),
            started=moment(fields.get("StartTime")),
            ended=moment(fields.get("EndTime")),
            preempted=moment(fields.get("PreemptTime")),
            folder=given(fields.get("WorkDir")),
            array=array,
            task=int(task) if is_task else None,
        )

    def _partition(self, fields: Mapping[str, str]) -> PartitionInfo:
        most = fields.get("MaxNodes", "UNLIMITED")
        return PartitionInfo(
            name=fields["PartitionName"],
            is_default=fields.get("Default") == "YES",
            state=fields.get("State", ""),
            nodes=self.hostnames(given(fields.get("Nodes"))),
            max_nodes=int(most) if most.isdigit() else None,
            max_time_s=limit_s(fields.get("MaxTime")),
            default_time_s=limit_s(fields.get("DefaultTime")),
            allowed_accounts=names_of(fields.get("AllowAccounts")),
            denied_accounts=names_of(fields.get("DenyAccounts")),
            allowed_qos=names_of(fields.get("AllowQos")),
            denied_qos=names_of(fields.get("DenyQos")),
            preempt_mode=given(fields.get("PreemptMode")),
            fields=fields,
        )

    def _remembered(self, job: str) -> list[JobInfo]:
        """From the accounts, where the site keeps some."""
        names = "JobID,JobName,User,Partition,State,NodeList,ExitCode,Submit,Start,End"
        command = ["sacct", "--parsable2", "--noheader", "--allocations", f"--jobs={job}"]
        try:
            text = self._call([*command, f"--format={names}"], patience_s=())
        except SlurmError:
            return []
        return [self._remembered_job(line) for line in text.splitlines() if line.count("|") >= 9]

    def _remembered_job(self, line: str) -> JobInfo:
        # A name may have the separator in it.
        number, *name, user, partition, state, nodes, code, submitted, started, ended = line.split(
            "|"
        )
        exit_code, _, signal = code.partition(":")
        array, _, task = number.partition("_")
        return JobInfo(
            id=number,
            name="|".join(name),
            user=user,
            partition=partition,
            state=state.split()[0] if state else "",
            nodes=() if nodes == "None assigned" else self.hostnames(nodes),
            exit_code=int(exit_code or 0),
            signal=int(signal or 0),
            submitted=moment(submitted),
            started=moment(started),
            ended=moment(ended),
            array=array if task else None,
            task=int(task) if task.isdigit() else None,
        )

    def _with_comment(self, comment: str) -> str | None:
        try:
            lines = self._call(["squeue", "--noheader", "--me", "--format=%A %k"]).splitlines()
        except SlurmError:
            return None
        return next((line.split()[0] for line in lines if line.split()[1:] == [comment]), None)

    def _call(
        self,
        command: Sequence[str],
        added: Mapping[str, str] | None = None,
        patience_s: Sequence[float] | None = None,
    ) -> str:
        return self._run(command, added, patience_s).stdout

    def _run(
        self,
        command: Sequence[str],
        added: Mapping[str, str] | None = None,
        patience_s: Sequence[float] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            name: value for name, value in self._environment.items() if not OF_A_JOB.match(name)
        }
        for wait in (*(self._patience_s if patience_s is None else patience_s), None):
            try:
                done = subprocess.run(
                    command,
                    env=environment | {"SLURM_TIME_FORMAT": "standard"} | dict(added or {}),
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=TIMEOUT_S,
                    check=False,
                )
            except FileNotFoundError:
                raise SlurmError(f"{command[0]} is not installed on this machine") from None
            except subprocess.TimeoutExpired:
                problem = f"Socket timed out: no answer within {TIMEOUT_S:g} s"
            else:
                if not done.returncode:
                    return done
                problem = _said(done.stderr) or f"exit code {done.returncode}"
            if wait is None or not IS_BUSY.search(problem):
                raise SlurmError(f"{command[0]}: {problem}")
            time.sleep(wait)
        raise AssertionError


def _node(fields: Mapping[str, str]) -> NodeInfo:
    # A mark behind a state says that the node does not answer, sleeps, or is started again.
    state, *flags = re.sub(r"[*~#!%$@^-]", "", fields.get("State", "")).split("+")
    gpus = re.findall(r"(?:^|,)gpu(?::([^:,(]+))?:(\d+)", given(fields.get("Gres")))
    return NodeInfo(
        name=fields["NodeName"],
        state=state,
        flags=(*flags, *(["NOT_RESPONDING"] if "*" in fields.get("State", "") else [])),
        address=fields.get("NodeAddr", ""),
        host=fields.get("NodeHostName", ""),
        # Without the cores that the site keeps for the system (CoreSpecCount), since 22.05.
        cpus=int(fields.get("CPUEfctv") or fields.get("CPUTot") or 0),
        memory_mb=int(fields.get("RealMemory", 0)),
        gpus=sum(int(number) for _, number in gpus),
        gpu_types=tuple(dict.fromkeys(kind for kind, _ in gpus if kind)),
        partitions=names_of(fields.get("Partitions")),
        features=names_of(fields.get("ActiveFeatures")),
        reason=fields.get("Reason", ""),
        version=fields.get("Version", ""),
        booted=moment(fields.get("BootTime")),
        started=moment(fields.get("SlurmdStartTime")),
    )


def _said(text: str) -> str:
    """What went wrong, of what a command printed to standard error."""
    lines = (re.sub(r"^\w+: (?:error: |fatal: )?", "", line) for line in text.splitlines())
    return "; ".join(dict.fromkeys(line.strip() for line in lines if line.strip()))
