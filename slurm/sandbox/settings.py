"""What a sandbox cluster is made of; kept in its folder for the commands that come later."""

import json
import random
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """How many nodes there are and what each of them has."""

    nodes: int = 4
    cpus: int = 8  # of each node; they need not exist
    gpus: int = 8  # of each node: devices that hold nothing
    hostnames: bool = False  # `hostname` on node 3 says node3, and the name resolves
    netns: bool = False  # each node has a network of its own, which can be cut; implies hostnames
    accounting: bool = False  # slurmdbd, so that sacct answers
    conf: list[str] = field(default_factory=list)  # more lines of slurm.conf, as in "KillWait=30"
    ports: list[int] = field(default_factory=list)  # of slurmctld, slurmdbd and each slurmd

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.cpus < 1 or self.gpus < 0:
            raise ValueError(f"a cluster needs nodes and CPUs, not {self}")

    def named(self) -> bool:
        """Whether nodes have host names of their own."""
        return self.hostnames or self.netns

    def address(self, node: int) -> str:
        """The IP address of a node; that of the controller for node 0."""
        if not self.netns:
            return "127.0.0.1"
        return f"10.77.0.{node or 254}"

    def write(self, folder: Path) -> None:
        (folder / "settings.json").write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Settings":
        """
        Raises:
            FileNotFoundError: no sandbox was started in this folder.
        """
        return cls(**json.loads((folder / "settings.json").read_text()))


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on, below those the kernel gives to connections."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 20_000), 10_000):
        if len(found) == count:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
    return found
