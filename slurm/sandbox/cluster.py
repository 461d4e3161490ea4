"""A cluster of munged, slurmctld and one slurmd for each node, all on this machine."""

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from slurm.sandbox import accounting, network, programs
from slurm.sandbox.configuration import user_name, write_configuration
from slurm.sandbox.processes import (
    DEADLINE_S,
    client_environment,
    kill,
    processes,
    start_daemon,
)
from slurm.sandbox.settings import Settings, free_ports

# The path of a UNIX socket has 107 characters at most; ours end with this, and a suffix of munge.
_LONGEST_FOLDER = 107 - len("/run/munge.socket.2.lock")


class Cluster:
    """A sandbox cluster, named by the folder that holds all of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    def start(self, settings: Settings) -> None:
        """Start it and wait until every node is idle.

        Raises:
            ValueError: it cannot be started like this; the text says what to do.
            TimeoutError: a daemon has not come up; the text names the logs.
            RefusedError: the kernel or the container forbids what hostnames or netns need.
        """
        self._check(settings)
        settings = replace(settings, ports=free_ports(settings.nodes + 2))
        write_configuration(self.folder, settings)
        settings.write(self.folder)
        try:
            self._start_daemons(settings)
        except BaseException:
            self.stop()
            raise

    def _check(self, settings: Settings) -> None:
        for program in programs.CLUSTER:
            programs.require(program)
        if (self.folder / "slurm.conf").exists():
            raise ValueError(f"{self.folder} has held a cluster: stop it and remove the folder")
        if len(str(self.folder)) > _LONGEST_FOLDER:
            raise ValueError(
                f"{self.folder}: sockets lie in it, so its path may have {_LONGEST_FOLDER} "
                "characters; take one in /tmp"
            )
        if settings.named():
            if os.getuid() != 0:
                raise ValueError("host names and networks of nodes need root; other options do not")
            for program in programs.NAMESPACES:
                programs.require(program)
            network.check_hostnames()

    def _start_daemons(self, settings: Settings) -> None:
        if settings.netns:
            network.make(self.folder, settings)
        run = self.folder / "run"
        files = [
            f"--key-file={self.folder}/munge.key",
            f"--socket={run}/munge.socket",
            f"--pid-file={run}/munged.pid",
            f"--seed-file={run}/munge.seed",
            f"--log-file={self.folder}/log/munged.log",
        ]
        # By force: the folder may lie below one that others can write to.
        self._start("munged", ["--foreground", "--force", *files])
        self._wait("munged", (run / "munge.socket").exists)
        if settings.accounting:
            accounting.start(self.folder, settings, self._in_network(0), self._wait)
        self._start("slurmctld", ["-D"])
        for node in range(1, settings.nodes + 1):
            self.start_node(node)
        self._wait("every node", self._is_idle)

    def _start(self, program: str, arguments: list[str]) -> None:
        command = [*self._in_network(0), programs.require(program), *arguments]
        start_daemon(self.folder, program, command)

    def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} did not come up; see the logs in {self.folder}/log")
            time.sleep(0.05)

    def _in_network(self, node: int) -> list[str]:
        return network.inside(self.folder, node) if self.settings().netns else []

    def settings(self) -> Settings:
        """What it was started with.

        Raises:
            ValueError: no cluster was started in this folder.
        """
        try:
            return Settings.read(self.folder)
        except FileNotFoundError:
            raise ValueError(
                f"no cluster was started in {self.folder}: python -m slurm.sandbox start DIR"
            ) from None

    def stop(self) -> None:
        """Kill every process of it, those of jobs as well; the folder with its logs stays."""
        settings = self.settings()
        kill(self.folder)
        if settings.netns:
            network.remove(self.folder, settings)

    def start_node(self, node: int) -> None:
        """Switch on a node: it has forgotten what ran on it."""
        name = self._name(node)
        (self.folder / "spool" / name).mkdir(exist_ok=True)
        slurmd = [programs.require("slurmd"), "-D", "-c", "-N", name]
        where = [*self._in_network(node), *self._as_host(name)]
        start_daemon(self.folder, name, [*where, *slurmd])

    def _as_host(self, name: str) -> list[str]:
        if not self.settings().named():
            return []
        become = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        hosts = f"{self.folder}/hosts"
        return ["unshare", "--uts", "--mount", "sh", "-c", become, "sh", name, hosts]

    def kill_node(self, node: int) -> None:
        """The node crashes: its slurmd, steps of jobs and tasks die at once."""
        kill(self.folder, self._name(node))

    def cut(self, node: int) -> None:
        """Unplug the node's network: what runs there runs on, and reaches nobody."""
        self._set_cable(node, "down")

    def join(self, node: int) -> None:
        """Plug the node's network in again."""
        self._set_cable(node, "up")

    def _set_cable(self, node: int, state: str) -> None:
        self._name(node)
        if not self.settings().netns:
            raise ValueError("nodes of this cluster share one network: start it with netns")
        network.set_cable(self.folder, node, state)

    def _name(self, node: int) -> str:
        nodes = self.settings().nodes
        if not 1 <= node <= nodes:
            raise ValueError(f"there is no node {node}: they are 1 to {nodes}")
        return f"node{node}"

    def environment(self) -> dict[str, str]:
        """In which Slurm's commands reach the cluster; with netns only through `command`."""
        return client_environment(self.folder)

    def command(self, *command: str, node: int = 0) -> list[str]:
        """The command as it is run where it reaches the cluster, or on a node.

        Args:
            node: 0: where the controller is.
        """
        if node == 0:
            return [*self._in_network(0), *command]
        name = self._name(node)
        if not self.settings().named():
            return list(command)
        slurmd = [pid for pid in processes(self.folder, name) if _is_slurmd(pid)]
        if not slurmd:
            raise ValueError(f"{name} is down: start-node brings it back")
        spaces = ["--net", "--uts", "--mount"]
        return ["nsenter", f"--target={slurmd[0]}", *spaces, f"--wd={Path.cwd()}", *command]

    def call(self, *command: str, node: int = 0, timeout_s: float = 60) -> str:
        """What a command prints that is run in reach of the cluster, or on a node.

        Raises:
            subprocess.CalledProcessError: it has failed.
        """
        return subprocess.check_output(
            self.command(*command, node=node),
            env=self.environment(),
            text=True,
            timeout=timeout_s,
        )

    def nodes(self) -> dict[str, str]:
        """The state of each node, as in `idle`, `mixed` or `down*`."""
        lines = self.call("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T")
        return dict(line.split() for line in lines.splitlines())

    def _is_idle(self) -> bool:
        try:
            states = self.nodes()
        except subprocess.CalledProcessError:
            return False
        return len(states) == self.settings().nodes and set(states.values()) == {"idle"}

    def reset(self) -> None:
        """Cancel all jobs, and wait until every node is back and has nothing to do.

        Raises:
            TimeoutError: after a minute it is not.
        """
        settings = self.settings()
        self.call("scancel", "--user", user_name())
        for node in range(1, settings.nodes + 1):
            if settings.netns:
                self.join(node)
            if not processes(self.folder, f"node{node}"):
                self.start_node(node)
        self._wait("every node", self._is_idle)

    def status(self) -> str:
        """Its processes, nodes and jobs."""
        pids = ",".join(map(str, processes(self.folder)))
        if not pids:
            return f"{self.folder}: stopped\n"
        shown = subprocess.run(
            ["ps", "-o", "pid,etime,args", "-p", pids], capture_output=True, text=True, check=False
        )
        return "\n".join(
            [shown.stdout, self.call("sinfo", "-N", "-p", "main"), self.call("squeue")]
        )


def _is_slurmd(pid: int) -> bool:
    """Whether it is a node's daemon, under the name that a distribution gives it."""
    return Path(os.readlink(f"/proc/{pid}/exe")).name.startswith("slurmd")
