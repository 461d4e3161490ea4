"""What is read of Slurm's plain text, and how a controller that is busy is met."""

from pathlib import Path

import pytest

from launch.slurm.client import Slurm, SlurmError
from launch.slurm.plain_text import limit_s, records
from pretrain.errors import UserError

# As scontrol of 22.05 prints it; the name is made to look like more fields.
JOB = """\
JobId=7 JobName=x JobState=COMPLETED Restarts=9
   UserId=me(1000) GroupId=me(1000) MCS_label=N/A
   Priority=4294901759 Nice=0 Account=(null) QOS=(null)
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=3:9
   RunTime=00:00:05 TimeLimit=1-00:30:00 TimeMin=N/A
   SubmitTime=2026-11-27T19:31:44 EligibleTime=2026-11-27T19:31:44
   StartTime=2026-11-27T19:31:45 EndTime=Unknown Deadline=N/A
   PreemptEligibleTime=2026-11-27T19:31:44 PreemptTime=None
   Partition=main AllocNode:Sid=login:42
   ReqNodeList=(null) ExcNodeList=node4
   NodeList=node[1-2]
   Command=/shared/a b JobState=FAILED
   WorkDir=/shared
   Comment=JobState=FAILED
"""
NODE = """\
NodeName=node1 Arch=x86_64 CoresPerSocket=1
   CPUAlloc=0 CPUEfctv=92 CPUTot=96 CPULoad=0.01
   AvailableFeatures=h100,ib
   ActiveFeatures=h100,ib
   Gres=gpu:h100:4(S:0-1),gpu:a100:2,nvme:1
   NodeAddr=10.0.0.1 NodeHostName=host1 Port=6818 Version=22.05.8
   OS=Linux 6.1 State=IDLE
   RealMemory=8000 AllocMem=0 FreeMem=1690 Sockets=2 Boards=1
   CoreSpecCount=4 CPUSpecList=44-47
   State=DOWN*+DRAIN ThreadsPerCore=1 TmpDisk=0 Weight=1 Owner=N/A
   Partitions=main,urgent
   BootTime=2026-11-26T23:26:36 SlurmdStartTime=2026-11-27T19:27:25
   Reason=Not responding State=IDLE [root@2026-11-27T19:28:54]
"""
PARTITION = """\
PartitionName=main
   AllowGroups=ALL AllowAccounts=a,b AllowQos=ALL
   AllocNodes=ALL Default=YES QoS=N/A
   DefaultTime=01:00:00 DisableRootJobs=NO
   MaxNodes=3 MaxTime=UNLIMITED MinNodes=0
   Nodes=node[1-2]
   OverTimeLimit=NONE PreemptMode=REQUEUE
   State=UP TotalCPUs=8 TotalNodes=2
"""


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder for programs that stand for Slurm's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write(folder, "sbatch", "exit 1")
    write(folder, "scontrol", "exit 1")
    return folder


def write(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\ncd {folder}\n{script}\n")
    (folder / name).chmod(0o755)


def client(commands: Path, tries: int = 2) -> Slurm:
    return Slurm({"PATH": f"{commands}:/usr/bin:/bin"}, patience_s=[0.0] * tries)


def shows(commands: Path, text: str) -> None:
    (commands / "shown").write_text(text)
    hosts = 'if [[ $2 == hostnames ]]; then printf "node1\\nnode2\\n"; else cat shown; fi'
    write(commands, "scontrol", hosts)


def test_a_job_is_read_whatever_it_is_called(commands: Path) -> None:
    shows(commands, JOB)
    job = client(commands).job("7")
    assert job
    assert (job.id, job.user, job.state, job.restarts) == ("7", "me", "RUNNING", 2)
    assert job.name == "x JobState=COMPLETED Restarts=9"
    assert (job.nodes, job.excluded) == (("node1", "node2"), ("node4",))
    assert (job.exit_code, job.signal, job.time_limit_s) == (3, 9, 88200)
    assert (job.preempted, job.ended, job.dependency) == (None, None, "")
    assert job.started
    assert (job.started.hour, job.started.second) == (19, 45)


def test_a_node_is_read(commands: Path) -> None:
    shows(commands, NODE)
    (node,) = client(commands).nodes()
    assert (node.state, node.flags) == ("DOWN", ("DRAIN", "NOT_RESPONDING"))
    assert (node.gpus, node.gpu_types, node.cpus) == (6, ("h100", "a100"), 92)
    assert (node.partitions, node.features) == (("main", "urgent"), ("h100", "ib"))
    assert node.has_failed
    assert not node.is_usable
    assert node.reason.startswith("Not responding State=IDLE")
    # Older versions do not say what is left for jobs.
    shows(commands, NODE.replace("CPUEfctv=92 ", ""))
    assert client(commands).nodes()[0].cpus == 96


def test_a_partition_is_read(commands: Path) -> None:
    shows(commands, PARTITION)
    (partition,) = client(commands).partitions()
    assert (partition.name, partition.is_default, partition.state) == ("main", True, "UP")
    assert (partition.max_nodes, partition.max_time_s) == (3, None)
    assert (partition.default_time_s, partition.allowed_accounts) == (3600, ("a", "b"))
    assert partition.allowed_qos == ()


def test_several_records_begin_at_their_first_field() -> None:
    text = "JobId=1 JobName=a\n   JobState=RUNNING\n\nJobId=2 JobName=b\n   JobState=PENDING\n"
    assert [record["JobState"] for record in records(text, "JobId")] == ["RUNNING", "PENDING"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1-00:30:00", 88200), ("00:01:00", 60), ("UNLIMITED", None), ("NONE", None), (None, None)],
)
def test_limits_as_slurm_prints_them(text: str | None, seconds: int | None) -> None:
    assert limit_s(text) == seconds


def test_a_busy_controller_is_asked_again(commands: Path) -> None:
    busy = "echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2"
    write(
        commands, "scontrol", f"echo >>asked; [[ $(wc -l <asked) -gt 2 ]] || {{ {busy}; exit 1; }}"
    )
    assert client(commands).call("scontrol", "ping") == ""
    write(commands, "scontrol", f"{busy}; exit 1")
    with pytest.raises(SlurmError, match=r"scontrol: .*Socket timed out"):
        client(commands).call("scontrol", "ping")


def test_a_job_that_was_taken_although_the_answer_was_lost_is_not_submitted_twice(
    commands: Path,
) -> None:
    lost = "echo 'sbatch: error: Batch job submission failed: Socket timed out' >&2; exit 1"
    write(commands, "sbatch", f'echo "$FARSPAN_SUBMISSION" >>words; echo "$3" >>submitted; {lost}')
    write(commands, "squeue", 'printf "6 else\\n7 %s\\n" "$(sed s/--comment=// submitted)"')
    assert client(commands).submit(Path("script"), []) == "7"
    assert len((commands / "submitted").read_text().splitlines()) == 1
    # The job itself knows by which word.
    words, comments = ((commands / name).read_text() for name in ("words", "submitted"))
    assert f"--comment={words}" == comments


def test_a_job_that_was_requeued_although_the_answer_was_lost_is_in_the_queue(
    commands: Path,
) -> None:
    lost = "slurm_requeue error: Socket timed out on send/recv operation"
    pending = "Job is pending execution for job 7"
    says = f'if [[ -e taken ]]; then echo "{pending}"; else touch taken; echo "{lost}"; fi'
    write(commands, "scontrol", f"echo $* >>asked; {{ {says}; }} >&2; exit 1")
    client(commands).requeue("7")
    assert (commands / "asked").read_text() == "requeue 7\n" * 2
    write(commands, "scontrol", "echo 'Access/permission denied for job 7' >&2; exit 1")
    with pytest.raises(SlurmError, match="permission denied"):
        client(commands).requeue("7")


def test_a_refusal_is_told_in_slurms_words(commands: Path) -> None:
    write(commands, "sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    with pytest.raises(SlurmError, match=r"^sbatch: invalid partition specified: x$"):
        client(commands).submit(Path("script"), [])


def test_a_job_that_is_forgotten_is_looked_up_in_the_accounts(commands: Path) -> None:
    forgotten = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    write(commands, "scontrol", forgotten)
    assert client(commands).job("7") is None
    line = "7|a|b|me|main|CANCELLED by 0|None assigned|0:15|2026-11-27T10:00:00|Unknown|Unknown"
    write(commands, "sacct", f"echo '{line}'")
    job = client(commands).job("7")
    assert job
    assert (job.name, job.state, job.signal, job.nodes) == ("a|b", "CANCELLED", 15, ())


def test_what_belongs_to_the_job_around_is_not_passed_on(commands: Path) -> None:
    write(commands, "scontrol", "env")
    of_the_job = {"SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "SLURM_CLUSTER_NAME", "PMI_RANK"}
    of_the_user = {"SBATCH_ACCOUNT"}
    # How a command finds its cluster, and proves who asks.
    of_the_cluster = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT"}
    of_the_cluster |= {"SLURM_SACK_SOCKET", "SLURM_SACK_KEY", "SLURM_SACK_JWKS"}
    around = dict.fromkeys(of_the_job | of_the_user | of_the_cluster, "x")
    slurm = Slurm({"PATH": f"{commands}:/usr/bin:/bin", **around})
    variables = dict(line.split("=", 1) for line in slurm.call("scontrol").splitlines())
    assert around.keys() & variables.keys() == of_the_user | of_the_cluster


def test_a_machine_without_slurm(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sbatch and scontrol not found on PATH.*launch local"):
        Slurm({"PATH": str(tmp_path)})
