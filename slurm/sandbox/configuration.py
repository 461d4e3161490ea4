"""The files that the daemons of a sandbox read."""

import os
import pwd
import secrets
import socket
import stat
from pathlib import Path

from slurm.sandbox.settings import Settings

FOLDERS = ("log", "run", "state", "spool", "dev")
# Lines of slurm.conf that may come more than once.
_REPEATED = ("NodeName", "PartitionName", "NodeSet", "DownNodes")


def write_configuration(folder: Path, settings: Settings) -> None:
    """Write what munged, slurmctld and slurmd need, and one line for users' shells."""
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    for gpu in range(settings.gpus):
        _make_device(folder / "dev" / f"gpu{gpu}")
    if settings.gpus:
        devices = f"{folder}/dev/gpu[0-{settings.gpus - 1}]"
        (folder / "gres.conf").write_text(f"Name=gpu File={devices}\n")
    if settings.named():
        lines = [f"{settings.address(node)} node{node}" for node in _numbers(settings)]
        (folder / "hosts").write_text(Path("/etc/hosts").read_text() + "\n".join(lines) + "\n")
    prolog = folder / "task_prolog"
    prolog.write_text(
        f'#!/bin/sh\necho "export {mark_of(folder)}/$SLURMD_NODENAME"\n',
    )
    prolog.chmod(0o755)
    (folder / "slurm.conf").write_text(slurm_conf(folder, settings))
    (folder / "env.sh").write_text(f"export SLURM_CONF={folder}/slurm.conf\n")


def mark_of(folder: Path) -> str:
    """What the environment of the sandbox's processes begins with, a slash and a name behind it."""
    return f"FARSPAN_SANDBOX={folder}"


def slurm_conf(folder: Path, settings: Settings) -> str:
    """The text of slurm.conf: what `settings.conf` names replaces what stands here."""
    values = _values(folder, settings)
    lines = []
    for line in settings.conf:
        key, _, value = line.partition("=")
        if key in _REPEATED:
            lines.append(line)
        else:
            values[key] = value
    lines = [f"{key}={value}" for key, value in values.items()] + lines
    return "\n".join([*lines, *_nodes(settings), *_partitions()]) + "\n"


def _values(folder: Path, settings: Settings) -> dict[str, str]:
    user = user_name()
    values = {
        "ClusterName": "sandbox",
        "SlurmctldHost": f"{socket.gethostname().partition('.')[0]}({settings.address(0)})",
        "SlurmctldPort": str(settings.ports[0]),
        "AuthType": "auth/munge",
        # A requeued job waits until its credential has expired, two minutes by default.
        "AuthInfo": f"socket={folder}/run/munge.socket,cred_expire=5",
        "SlurmUser": user,
        "SlurmdUser": user,
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool/%n",
        "SlurmctldPidFile": f"{folder}/run/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/run/%n.pid",
        "SlurmctldLogFile": f"{folder}/log/slurmctld.log",
        "SlurmdLogFile": f"{folder}/log/%n.log",
        "SlurmctldDebug": "verbose",
        "SlurmdDebug": "verbose",
        "MailProg": "/bin/true",
        "TaskProlog": f"{folder}/task_prolog",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        # Nodes have what is written below, whatever the machine has.
        "SlurmdParameters": "config_overrides",
        "GresTypes": "gpu",
        "ReturnToService": "1",
        "JobRequeue": "1",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SchedulerParameters": "bf_interval=1,sched_min_interval=0,batch_sched_delay=0",
        # A node that says nothing for so long is down: long enough for a busy machine.
        "SlurmdTimeout": "10",
        "TCPTimeout": "2",
        "KillWait": "5",
        "MinJobAge": "86400",
        "EpilogMsgTime": "0",
    }
    if not settings.netns:
        # Only this machine can reach it.
        values["CommunicationParameters"] = "NoInAddrAny,NoCtldInAddrAny"
    if settings.accounting:
        values |= {
            "JobAcctGatherType": "jobacct_gather/linux",
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": str(settings.ports[1]),
            "AccountingStoragePass": f"{folder}/run/munge.socket",
            "AccountingStorageTRES": "gres/gpu",
        }
    return values


def _nodes(settings: Settings) -> list[str]:
    machine = socket.gethostname().partition(".")[0]
    return [
        f"NodeName=node{node} NodeHostname={f'node{node}' if settings.named() else machine} "
        f"NodeAddr={settings.address(node)} Port={settings.ports[1 + node]} "
        f"CPUs={settings.cpus} RealMemory=8000"
        + (f" Gres=gpu:{settings.gpus}" if settings.gpus else "")
        for node in _numbers(settings)
    ]


def _partitions() -> list[str]:
    """Jobs of `urgent` take the nodes of those of `main`, and both those of `preempt`."""
    return [
        "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10",
        "PartitionName=preempt Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime=5",
        "PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF",
    ]


def slurmdbd_conf(folder: Path, settings: Settings) -> str:
    """The text of slurmdbd.conf, for a database behind a socket in the folder."""
    values = {
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/run/munge.socket",
        "DbdHost": "localhost",
        "DbdAddr": "127.0.0.1",
        "DbdPort": str(settings.ports[1]),
        "SlurmUser": user_name(),
        "LogFile": f"{folder}/log/slurmdbd.log",
        "PidFile": f"{folder}/run/slurmdbd.pid",
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "localhost",
        "StorageUser": "root",
        "StorageLoc": "slurm",
    }
    return "".join(f"{key}={value}\n" for key, value in values.items())


def _make_device(path: Path) -> None:
    """Slurm takes a GPU for real where its file is a device; here that of /dev/null."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        path.touch()


def _numbers(settings: Settings) -> range:
    return range(1, settings.nodes + 1)


def user_name() -> str:
    """Whose daemons and jobs they are."""
    return pwd.getpwuid(os.getuid()).pw_name
