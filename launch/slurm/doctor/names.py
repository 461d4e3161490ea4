"""Names: does every node find every other one, and its own address?

gloo tells other ranks the address to which the host name of its own machine resolves, unless an
interface is named; where there is none it tells them 127.0.0.1, and the job hangs.
"""

import fcntl
import ipaddress
import socket
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from launch.slurm.doctor.findings import Check, Finding, listed
from pretrain.settings import Section

LOOPBACK = "127.0.0.1"
SIOCGIFADDR = 0x8915
HOSTS = "mend DNS, or /etc/hosts of that node"


class Names(Section):
    """What a node finds out about names.

    Attributes:
        own: the addresses of its own host name.
        found: the addresses of the nodes it was asked for, by Slurm's name and by NodeAddr.
        interfaces: the address of each network interface that has one.
    """

    hostname: str
    own: tuple[str, ...]
    found: dict[str, tuple[str, ...]]
    interfaces: dict[str, str]


def measure(nodes: Mapping[str, str]) -> Names:
    """
    Args:
        nodes: those to ask for, NodeAddr by name, as Slurm has them.
    """
    hostname = socket.gethostname()
    return Names(
        hostname=hostname,
        own=resolve(hostname),
        found={name: resolve(name) for name in sorted({*nodes, *nodes.values()})},
        interfaces=addresses_of_interfaces(),
    )


def announced(names: Names, interface: str | None) -> str:
    """The address that gloo tells other ranks to connect to on this node.

    Args:
        interface: of the profile; gloo is not told of patterns (launch.environment).
    """
    named = [] if _is_pattern(interface) else interfaces_of(interface or "=", names.interfaces)
    return next(iter([*(names.interfaces[name] for name in named), *names.own]), LOOPBACK)


def resolve(name: str) -> tuple[str, ...]:
    """The IPv4 addresses of a name, as the C library finds them; none if it does not resolve."""
    try:
        found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ()
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found))


def addresses_of_interfaces() -> dict[str, str]:
    """The IPv4 address of each network interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):
                answer = fcntl.ioctl(asking.fileno(), SIOCGIFADDR, request)
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def interfaces_of(wish: str, there: Iterable[str]) -> list[str]:
    """Those that NCCL_SOCKET_IFNAME means: prefixes, whole names after `=`, all but these after
    `^` and `^=` (docs of NCCL, environment variables).
    """
    kind = wish[: len(wish) - len(wish.lstrip("^="))]
    wished = tuple(name for name in wish.lstrip("^=").split(",") if name)

    def is_meant(name: str) -> bool:
        return name in wished if "=" in kind else name.startswith(wished)

    return [name for name in there if is_meant(name) != ("^" in kind)]


def _is_pattern(interface: str | None) -> bool:
    return interface is not None and interface.startswith(("^", "="))


def check(measured: Mapping[str, Names], nodes: Mapping[str, str], interface: str | None) -> Check:
    """
    Args:
        measured: by node.
        nodes: NodeAddr by name.
        interface: of the profile.
    """
    findings = _unresolved(measured, nodes)
    if interface:
        findings += _without_interface(measured, interface)
    if interface is None or _is_pattern(interface):
        findings += _own_names(measured, nodes)
    hosts = listed(names.hostname for names in measured.values())
    return Check("names", f"hosts {hosts}", tuple(findings))


def _unresolved(measured: Mapping[str, Names], nodes: Mapping[str, str]) -> list[Finding]:
    """Names that resolve on some nodes only, or nowhere and have no address in slurm.conf."""
    findings = []
    for node, address in nodes.items():
        asked = [at for at, names in measured.items() if node in names.found]
        known = [at for at in asked if measured[at].found[node]]
        unknown = [at for at in asked if at not in known]
        if unknown and known:
            findings.append(
                Finding(
                    listed(unknown),
                    f"the name {node} does not resolve here, and does on {listed(known)}",
                    f"{HOSTS}, so that it is as on the others",
                )
            )
        lost = [at for at in unknown if not measured[at].found.get(address)]
        if lost and not known:
            findings.append(
                Finding(
                    listed(lost),
                    f"the name {node} does not resolve, nor does its NodeAddr {address}",
                    f"{HOSTS}; or ask for a NodeAddr in slurm.conf that is an IP address",
                )
            )
    return findings


def _own_names(measured: Mapping[str, Names], nodes: Mapping[str, str]) -> list[Finding]:
    findings = []
    for node, names in measured.items():
        name_it = (
            "or name the interface in the profile (network.interface; there are "
            f"{listed(names.interfaces)})"
        )
        if not names.own:
            findings.append(
                Finding(
                    node,
                    f"its own host name {names.hostname} does not resolve: gloo would tell other "
                    f"nodes to connect to {LOOPBACK}",
                    f"{HOSTS}; {name_it}",
                )
            )
        elif is_local(names.own) and not is_local(names.found.get(nodes.get(node, node), ())):
            findings.append(
                Finding(
                    node,
                    f"its own host name {names.hostname} resolves to {', '.join(names.own)}: gloo "
                    "would tell other nodes to connect there, to themselves",
                    f"remove the name from that line of its /etc/hosts; {name_it}",
                )
            )
    return findings


def is_local(addresses: Sequence[str]) -> bool:
    """Whether only the machine itself is reached by them; so are all nodes of a sandbox."""
    return bool(addresses) and all(ipaddress.ip_address(one).is_loopback for one in addresses)


def _without_interface(measured: Mapping[str, Names], interface: str) -> list[Finding]:
    # gloo takes whole names where NCCL takes prefixes.
    wish = interface if _is_pattern(interface) else f"={interface}"
    by_offer: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for node, names in measured.items():
        if not interfaces_of(wish, names.interfaces):
            by_offer[tuple(sorted(names.interfaces))].append(node)
    return [
        Finding(
            listed(without),
            f"no network interface with an address is as network.interface = {interface} says",
            f"name in the profile one of those that are there: {listed(offer)}",
        )
        for offer, without in by_offer.items()
    ]
