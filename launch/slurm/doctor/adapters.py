"""Network adapters for RDMA: are those there that NCCL is told to use, and may ranks use them?

Without one of them, or without memory that may be locked, NCCL sends over TCP, and says so only
where NCCL_DEBUG asks it to.
"""

import resource
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from launch.slurm.doctor.findings import Check, Finding, listed
from pretrain.settings import Section

DEVICES = Path("/sys/class/infiniband")
ACTIVE = "ACTIVE"


class Adapters(Section):
    """What a node has.

    Attributes:
        ports: the state of each port, as in {"mlx5_0:1": "ACTIVE"}.
        lockable: bytes of memory that a rank may lock; None: all.
    """

    ports: dict[str, str]
    lockable: int | None


def measure(devices: Path = DEVICES) -> Adapters:
    ports = {}
    for state in sorted(devices.glob("*/ports/*/state")):
        with suppress(OSError):
            # As in "4: ACTIVE".
            name = f"{state.parts[-4]}:{state.parts[-2]}"
            ports[name] = state.read_text().partition(":")[2].strip()
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Adapters(ports=ports, lockable=None if limit == resource.RLIM_INFINITY else limit)


def ports_of(wish: str, there: Iterable[str]) -> list[str]:
    """Those that NCCL_IB_HCA means: prefixes of names, whole names after `=`, all but these after
    `^` and `^=`; each with a port behind a colon, or all of them (docs of NCCL).
    """
    kind = wish[: len(wish) - len(wish.lstrip("^="))]
    wished = [name.partition(":") for name in wish.lstrip("^=").split(",") if name]

    def is_meant(port: str) -> bool:
        name, _, number = port.partition(":")
        return any(
            (name == device if "=" in kind else name.startswith(device)) and of in ("", number)
            for device, _, of in wished
        )

    return [port for port in there if is_meant(port) != ("^" in kind)]


def check(measured: Mapping[str, Adapters], hcas: str | None) -> Check:
    """
    Args:
        measured: by node.
        hcas: of the profile; None: NCCL takes what is active.
    """
    there = {node: _chosen(adapters, hcas) for node, adapters in measured.items()}
    active = {node: _active(ports) for node, ports in there.items()}
    are_named = hcas is not None and not hcas.startswith("^")
    findings = [
        *(_absent(measured, str(hcas)) if are_named else _fewer(active)),
        *(_inactive(there) if hcas else ()),
        *_unlockable({node: measured[node] for node, count in active.items() if count}),
    ]
    counts = " or ".join(map(str, sorted(set(active.values()))))
    return Check("adapters", f"{counts} active ports on a node", tuple(findings))


def _unlockable(using: Mapping[str, Adapters]) -> list[Finding]:
    by_limit: defaultdict[int, list[str]] = defaultdict(list)
    for node, adapters in using.items():
        if adapters.lockable is not None:
            by_limit[adapters.lockable].append(node)
    return [
        Finding(
            listed(nodes),
            f"a rank may lock {limit >> 10} KiB of memory, and RDMA locks all that it sends",
            "have LimitMEMLOCK=infinity set for slurmd, and PropagateResourceLimitsExcept=MEMLOCK "
            "in slurm.conf",
        )
        for limit, nodes in by_limit.items()
    ]


def _active(ports: Mapping[str, str]) -> int:
    return sum(state == ACTIVE for state in ports.values())


def _chosen(adapters: Adapters, hcas: str | None) -> dict[str, str]:
    """The ports that NCCL would use if they were active."""
    if hcas is None:
        return {port: state for port, state in adapters.ports.items() if state == ACTIVE}
    return {port: adapters.ports[port] for port in ports_of(hcas, adapters.ports)}


def _absent(measured: Mapping[str, Adapters], hcas: str) -> list[Finding]:
    """Adapters that the profile names and a node does not have."""
    kind = "=" if hcas.startswith("=") else ""
    absent: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for node, adapters in measured.items():
        names = [name for name in hcas.lstrip("=").split(",") if name]
        lost = [name for name in names if not ports_of(kind + name, adapters.ports)]
        if lost:
            offer = listed({port.partition(":")[0] for port in adapters.ports}) or "none"
            absent[listed(lost), offer].append(node)
    return [
        Finding(
            listed(nodes),
            f"no adapter {lost}, which network.hcas = {hcas} names; there: {offer}",
            "name those that are there in the profile; or have the adapter, or its driver, mended",
        )
        for (lost, offer), nodes in absent.items()
    ]


def _inactive(there: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    down: defaultdict[str, list[str]] = defaultdict(list)
    for node, ports in there.items():
        lost = [f"{port} is {state}" for port, state in ports.items() if state != ACTIVE]
        if lost:
            down["; ".join(lost)].append(node)
    fix = "have cable, switch and subnet manager looked at; leave the node out until then"
    return [Finding(listed(nodes), what, fix) for what, nodes in down.items()]


def _fewer(active: Mapping[str, int]) -> list[Finding]:
    most = max(active.values(), default=0)
    fewer: defaultdict[int, list[str]] = defaultdict(list)
    for node, count in active.items():
        if count < most:
            fewer[count].append(node)
    return [
        Finding(
            listed(nodes),
            f"{count} active ports, elsewhere {most}: all ranks wait for the slowest node",
            "have the adapters there looked at (`ibstat`); leave the node out until then",
        )
        for count, nodes in fewer.items()
    ]
