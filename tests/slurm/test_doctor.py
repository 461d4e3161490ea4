"""`farspan launch doctor` on a real cluster, whose nodes have a network of their own."""

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from slurm.sandbox import network
from slurm.sandbox.cluster import Cluster
from tests.nvidia_smi import smi, write_nvidia_smi
from tests.ranks import TIMEOUT_S
from tests.slurm.conftest import SETTINGS, started_cluster

pytestmark = pytest.mark.slow

AHEAD_S = 90


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[Cluster]:
    with started_cluster(replace(SETTINGS, netns=True)) as cluster:
        yield cluster


class Doctor:
    """The command, with what it has printed."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster = cluster
        self._folder = folder
        self.runs = folder / "runs of '[mine]' $(touch x) ü"
        # Whatever this machine has: the cluster's nodes have GPUs that hold nothing.
        self.environment = {"CUDA_VISIBLE_DEVICES": ""}
        self.printed = ""

    def examine(self, *options: str, **profile: object) -> int:
        """The exit code for a profile that is the sandbox's but for what is given."""
        path = self._folder / "site.yaml"
        path.write_text(yaml.safe_dump({"extends": "local-sandbox", **profile}))
        command = [sys.executable, "-m", "launch.cli", "launch", "doctor", f"--profile={path}"]
        done = subprocess.run(
            self._cluster.command(*command, f"--dir={self.runs}", *options),
            env=self._cluster.environment() | self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        self.printed = done.stdout
        return done.returncode

    def findings(self) -> dict[str, str]:
        """What is wrong, by check and place, as in "disk, node1"."""
        _, _, below_the_table = self.printed.partition("\n\n")
        return dict(re.findall(r"^(\w[^:\n]+, [^:\n]+): (.*)", below_the_table, re.MULTILINE))

    def logs(self) -> str:
        return "".join(log.read_text() for log in self.runs.rglob("*.log"))


@pytest.fixture
def doctor(cluster: Cluster, tmp_path: Path) -> Doctor:
    return Doctor(cluster, tmp_path)


def test_nothing_is_found_on_a_healthy_cluster(doctor: Doctor) -> None:
    code = doctor.examine("--nodes=4")
    assert code == 0, doctor.printed + doctor.logs()
    assert "nothing found that should be mended" in doctor.printed
    assert "8 of 8 ranks on node1, node2, node3, node4" in doctor.printed
    assert "the request to stop came to 4 of 4 nodes" in doctor.printed
    assert re.search(r"all-reduce +[\d.e-]+ GB/s bus bandwidth \(gloo, 8 ranks", doctor.printed)
    # It leaves nothing behind.
    assert list(doctor.runs.iterdir()) == []


def test_a_wrong_partition_is_found_before_anything_is_submitted(doctor: Doctor) -> None:
    assert doctor.examine(partition="mian") == 1
    assert "'mian' is not known, did you mean main?" in doctor.findings()["partition, the profile"]
    assert not doctor.runs.exists()


def test_a_wrong_gpu_flag_is_found_before_anything_is_submitted(doctor: Doctor) -> None:
    """One that the nodes have too little for, and one that Slurm itself refuses."""
    assert doctor.examine(gpus="gpus-per-node", ranks_per_node=3) == 1
    assert "has 2 GPUs: ranks_per_node can be so many" in doctor.findings()["nodes, main"]
    assert doctor.examine(gpus="gres", gpu_type="h100") == 1
    assert "Requested node configuration is not available" in doctor.findings()["sbatch, sbatch"]


def test_a_job_that_does_not_start_in_time_is_cancelled(cluster: Cluster, doctor: Doctor) -> None:
    cluster.call("sbatch", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1000")
    assert doctor.examine("--nodes=4", "--wait=0") == 1
    assert (
        "has not started within 0 minutes: it waited for" in doctor.findings()["queue, the queue"]
    )
    assert "farspan-doctor" not in cluster.call("squeue", "--noheader", "--format=%j")


def test_what_is_wrong_with_nodes_is_found_on_each(
    cluster: Cluster, doctor: Doctor, tmp_path: Path
) -> None:
    """All at once, as a job takes half a minute: each finding names its node alone."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with ExitStack() as planted:
        for fault in (
            no_requeue(cluster, doctor),
            blocked_ports(cluster, 1),
            unresolvable_name(cluster, 2, "node3", tmp_path / "hosts"),
            full_disk(cluster, 3, scratch),
            other_version(cluster, 4, tmp_path / "METADATA"),
            clock_ahead(cluster, 2, tmp_path / "clock"),
            ill_gpus(cluster, doctor, 3, tmp_path / "bin"),
        ):
            planted.enter_context(fault)
        code = doctor.examine("--nodes=4", scratch=str(scratch), gpus="gpus-per-node")
    assert code == 1, doctor.printed
    found = doctor.findings()
    assert sorted(found) == [
        "GPUs, node3",
        "clocks, node2",
        "disk, node3",
        "names, node2",
        "ports, node1",
        "requeue, slurm.conf",
        "versions, node4",
    ], doctor.printed + doctor.logs()
    assert f"its clock is {AHEAD_S}.0 s ahead of that of the others" in found["clocks, node2"]
    assert f"{scratch} (compiled kernels" in found["disk, node3"]
    assert "is full: No space left on device" in found["disk, node3"]
    assert "the name node3 does not resolve here, and does on node1" in found["names, node2"]
    assert "node2, node3, node4 cannot connect to it at node1, port 2" in found["ports, node1"]
    assert found["requeue, slurm.conf"].startswith("JobRequeue=0")
    # What jobs are submitted with beats the environment.
    assert re.search(r"^job +Requeue=1 ", doctor.printed, re.MULTILINE)
    assert "has had 2 ECC errors that were not corrected" in found["GPUs, node3"]
    version = importlib.metadata.version("numpy")
    assert f"numpy 9.9.9, elsewhere {version}" in found["versions, node4"]
    # Each with what to do, and with the measurements.
    assert doctor.printed.count("to mend it:") == len(found)
    (kept,) = doctor.runs.iterdir()
    assert str(kept) in doctor.printed


@contextmanager
def no_requeue(cluster: Cluster, doctor: Doctor) -> Iterator[None]:
    """Neither by default nor where the batch script asks for it."""
    doctor.environment["SBATCH_NO_REQUEUE"] = "1"
    path = cluster.folder / "slurm.conf"
    before = path.read_text()
    for text in (before.replace("JobRequeue=1", "JobRequeue=0"), before):
        path.write_text(text)
        cluster.call("scontrol", "reconfigure")
        if text != before:
            yield


@contextmanager
def blocked_ports(cluster: Cluster, node: int) -> Iterator[None]:
    """No connection comes through to the ports where ranks meet; Slurm has others."""
    space = network.namespace(cluster.folder, node)

    def rule(*words: str) -> None:
        subprocess.run(["ip", "-n", space, "rule", *words], check=True, timeout=60)

    ports = ("iif", "eth0", "ipproto", "tcp", "dport", "20000-32767", "prohibit")
    # What is for the machine itself is looked up first, by default.
    rule("add", "pref", "100", "lookup", "local")
    rule("del", "pref", "0")
    rule("add", "pref", "10", *ports)
    yield
    rule("del", "pref", "10")


@contextmanager
def mounted(cluster: Cluster, node: int, *mount: str) -> Iterator[None]:
    """Something that this node alone sees in the place that is named last."""
    cluster.call("mount", *mount, node=node)
    yield
    cluster.call("umount", mount[-1], node=node)


@contextmanager
def unresolvable_name(cluster: Cluster, node: int, name: str, hosts: Path) -> Iterator[None]:
    lines = cluster.call("cat", "/etc/hosts", node=node).splitlines()
    hosts.write_text("\n".join(line for line in lines if name not in line.split()) + "\n")
    with mounted(cluster, node, "--bind", str(hosts), "/etc/hosts"):
        yield


@contextmanager
def full_disk(cluster: Cluster, node: int, folder: Path) -> Iterator[None]:
    with mounted(cluster, node, "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)):
        yield


@contextmanager
def other_version(cluster: Cluster, node: int, metadata: Path) -> Iterator[None]:
    """The node's own disk, say, has an older numpy."""
    files = importlib.metadata.files("numpy") or []
    real = next(str(file.locate()) for file in files if file.name == "METADATA")
    metadata.write_text(
        re.sub("^Version: .*", "Version: 9.9.9", Path(real).read_text(), flags=re.MULTILINE)
    )
    with mounted(cluster, node, "--bind", str(metadata), os.path.realpath(real)):
        yield


@contextmanager
def clock_ahead(cluster: Cluster, node: int, folder: Path) -> Iterator[None]:
    """Whoever asks for the time in Python on this node, whose kernel is that of the others."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        f"import time\nreal = time.time\ntime.time = lambda: real() + {AHEAD_S}\n"
    )
    prolog = cluster.folder / "task_prolog"
    before = prolog.read_text()
    prolog.write_text(
        f"{before}[ $SLURMD_NODENAME != node{node} ] || echo export PYTHONPATH={folder}\n"
    )
    yield
    prolog.write_text(before)


@contextmanager
def ill_gpus(cluster: Cluster, doctor: Doctor, node: int, folder: Path) -> Iterator[None]:
    """Two on each node, and on this one the first has errors."""
    folder.mkdir()
    errors = f"$([ $SLURMD_NODENAME = node{node} ] && echo 2 || echo 0)"
    write_nvidia_smi(folder / "nvidia-smi", smi(dram_uncorrectable=errors))
    doctor.environment["PATH"] = f"{folder}:{os.environ['PATH']}"
    with ExitStack() as memories:
        # In a container there may be little of it.
        for one in range(1, cluster.settings().nodes + 1):
            shared = ("-t", "tmpfs", "-o", "size=2g", "tmpfs", "/dev/shm")
            memories.enter_context(mounted(cluster, one, *shared))
        yield
