"""A network of its own for each node, and one for the controller, in whose bridge they meet."""

import hashlib
import subprocess
from pathlib import Path

from slurm.sandbox.settings import Settings


class RefusedError(OSError):
    """The kernel, or the container this runs in, allows no namespaces."""


def namespace(folder: Path, node: int) -> str:
    """The network namespace of a node; that of the controller for node 0."""
    return f"farspan-{hashlib.sha256(bytes(folder)).hexdigest()[:8]}-{node}"


def inside(folder: Path, node: int) -> list[str]:
    """What runs a command in the network of a node, when written in front of it."""
    return ["nsenter", f"--net=/run/netns/{namespace(folder, node)}"]


def make(folder: Path, settings: Settings) -> None:
    """
    Raises:
        RefusedError: nodes cannot have networks of their own here.
    """
    controller = namespace(folder, 0)
    for node in range(settings.nodes + 1):
        _ip("netns", "add", namespace(folder, node))
        _ip("-n", namespace(folder, node), "link", "set", "lo", "up")
    _ip("-n", controller, "link", "add", "br0", "type", "bridge")
    _ip("-n", controller, "addr", "add", f"{settings.address(0)}/24", "dev", "br0")
    _ip("-n", controller, "link", "set", "br0", "up")
    for node in range(1, settings.nodes + 1):
        own = namespace(folder, node)
        peer = ["peer", "name", _port(node), "netns", controller]
        _ip("-n", own, "link", "add", "eth0", "type", "veth", *peer)
        _ip("-n", own, "addr", "add", f"{settings.address(node)}/24", "dev", "eth0")
        _ip("-n", own, "link", "set", "eth0", "up")
        _ip("-n", controller, "link", "set", _port(node), "master", "br0", "up")


def remove(folder: Path, settings: Settings) -> None:
    for node in range(settings.nodes + 1):
        if Path("/run/netns", namespace(folder, node)).exists():
            _ip("netns", "del", namespace(folder, node))


def set_cable(folder: Path, node: int, state: str) -> None:
    """Plug in a node's network ("up") or unplug it ("down"): packets vanish, nobody is told."""
    _ip("-n", namespace(folder, 0), "link", "set", _port(node), state)


def _port(node: int) -> str:
    return f"port{node}"


def check_hostnames() -> None:
    """
    Raises:
        RefusedError: nodes cannot have host names of their own here.
    """
    _run("unshare", "--uts", "--mount", "true")


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise RefusedError(
            f"the kernel or this container refused `{' '.join(command)}`: {done.stderr.strip()}"
        )
