"""Ports and clocks: can the nodes connect to each other, and do they agree on the time?

Each node listens, and tells whoever connects what its clock says. The offset of two clocks is known
to half of a round trip (F. Cristian, Probabilistic clock synchronization, 1989).
"""

import json
import socket
import statistics
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress

from launch.slurm.doctor.findings import Check, Finding, listed
from launch.slurm.doctor.waiting import wait_until
from pretrain.settings import Section

# A packet that a firewall drops is never answered.
CONNECT_S = 10.0
# A node that is busy answers late.
ANSWER_S = 30.0
ROUND_TRIPS = 8
# What files, leases and signatures of requests bear.
SKEW_S = 1.0
# munge, by which Slurm's daemons know each other, refuses what is older.
MUNGE_S = 300.0


class Reached(Section):
    """What became of a connection from one node to another.

    Attributes:
        error: why there is none.
        ahead_s: how much the other clock is ahead of the own one.
        within_s: to how many seconds that is known.
    """

    node: str
    address: str
    port: int
    error: str | None = None
    ahead_s: float = 0.0
    within_s: float = 0.0


class Taken(Section):
    """A port on which a node could not listen."""

    port: int
    error: str


class Listener:
    """Answers everyone who connects: what the clock says, and how far this node has come."""

    def __init__(self, port: int = 0) -> None:
        """
        Args:
            port: 0: one that is free.

        Raises:
            OSError: the port is taken.
        """
        self.stage = 0
        self._socket = socket.create_server(("", port), backlog=1024)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with suppress(OSError), closing(connection):
            connection.settimeout(ANSWER_S)
            while connection.recv(1):
                answer = {"clock": time.time(), "stage": self.stage}
                connection.sendall(_framed(answer))


def connect(node: str, address: str, port: int, stage: int = 0) -> Reached:
    """Connect to the listener of a node, compare clocks, and wait until it has come to `stage`."""
    here = {"node": node, "address": address, "port": port}
    try:
        with socket.create_connection((address, port), CONNECT_S) as connection:
            connection.settimeout(ANSWER_S)
            within, ahead = min(_round_trip(connection)[:2] for _ in range(ROUND_TRIPS))
            if not wait_until(lambda: _round_trip(connection)[2] >= stage, ANSWER_S):
                raise TimeoutError("it answers, and has got stuck in checks of its own")
    except OSError as error:
        return Reached(**here, error=error.strerror or str(error) or type(error).__name__)
    except (ValueError, KeyError, TypeError):
        return Reached(**here, error="something else listens there")
    return Reached(**here, ahead_s=ahead, within_s=within)


def _round_trip(connection: socket.socket) -> tuple[float, float, int]:
    """To how many seconds the offset is known, the offset of the other clock, its stage."""
    before, start = time.time(), time.monotonic()
    connection.sendall(b"?")
    (length,) = struct.unpack("!H", _receive(connection, 2))
    answer = json.loads(_receive(connection, length))
    half = (time.monotonic() - start) / 2
    return half, answer["clock"] - (before + half), answer["stage"]


def _framed(answer: Mapping[str, float]) -> bytes:
    text = json.dumps(answer).encode()
    return struct.pack("!H", len(text)) + text


def _receive(connection: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length:
        part = connection.recv(length - len(received))
        if not part:
            raise ConnectionError("it has closed the connection")
        received += part
    return received


def peers_of(number: int, nodes: int) -> list[int]:
    """Whom a node connects to: the first, and those 1, 2, 4, ... places further, in a circle.

    So every node is asked by several others, and a thousand nodes need ten connections each.
    """
    return sorted({0, *((number + one) % nodes for one in _distances(nodes))} - {number})


def callers_of(number: int, nodes: int) -> list[int]:
    """Who connects to a node."""
    if number == 0:
        return list(range(1, nodes))
    return sorted({(number - one) % nodes for one in _distances(nodes)} - {number})


def _distances(nodes: int) -> list[int]:
    return [1 << power for power in range(nodes.bit_length()) if 1 << power < nodes]


def check_ports(measured: Mapping[str, Sequence[Reached]], taken: Mapping[str, Taken]) -> Check:
    """
    Args:
        measured: by the node that connected.
        taken: by node, where it could not listen: whatever does so now is no answer.
    """
    lost = {(node, one.port) for node, one in taken.items()}
    tried = {
        node: [one for one in reached if (one.node, one.port) not in lost]
        for node, reached in measured.items()
    }
    failed = {node: [one for one in reached if one.error] for node, reached in tried.items()}
    # Nobody else gets through from here: it is this node that is cut off.
    mute = {node for node, all_ in tried.items() if all_ and len(failed[node]) == len(all_)}
    if len(mute) == len(tried):
        mute = set()
    findings = [
        Finding(
            node,
            f"port {one.port}, on which ranks meet, cannot be had: {one.error}",
            "see by `ss --listening --processes` what listens there, and end it; the next job "
            "takes another port",
        )
        for node, one in taken.items()
    ]
    findings += [_cannot_reach(node, failed[node]) for node in sorted(mute)]
    by_target: defaultdict[str, list[tuple[str, Reached]]] = defaultdict(list)
    for node in failed.keys() - mute:
        for one in failed[node]:
            if one.node not in mute:
                by_target[one.node].append((node, one))
    findings += [_is_not_reached(node, by_target[node]) for node in sorted(by_target)]
    count = sum(len(all_) for all_ in tried.values())
    return Check("ports", f"{count} connections between nodes", tuple(findings))


def _cannot_reach(node: str, failed: Sequence[Reached]) -> Finding:
    return Finding(
        node,
        f"cannot connect to {listed(one.node for one in failed)} "
        f"({failed[0].address}:{failed[0].port}): {failed[0].error}",
        _open_ports("out of"),
    )


def _is_not_reached(node: str, failed: Sequence[tuple[str, Reached]]) -> Finding:
    one = failed[0][1]
    ports = sorted({reached.port for _, reached in failed})
    return Finding(
        node,
        f"{listed(source for source, _ in failed)} cannot connect to it at {one.address}, port "
        f"{' and '.join(map(str, ports))}: {one.error}",
        _open_ports("into"),
    )


def _open_ports(direction: str) -> str:
    return (
        f"let TCP {direction} this node through its firewall, from node to node on all ports from "
        "1024: ranks meet on one from 20000 to 32767, gloo and NCCL take any; or name an interface "
        "that is open in the profile (network.interface)"
    )


def check_clocks(measured: Mapping[str, Sequence[Reached]], first: str) -> Check:
    """
    Args:
        measured: by the node that connected.
        first: the node that all of them connect to.
    """
    # How far each clock is ahead of the first one's, and to how many seconds that is known.
    ahead, within = {first: 0.0}, {first: 0.0}
    for node, reached in measured.items():
        asked = [one for one in reached if one.node == first and not one.error]
        if asked:
            best = min(asked, key=lambda one: one.within_s)
            ahead[node], within[node] = -best.ahead_s, best.within_s
    usual = statistics.median_low(ahead.values())
    usual_within = min(within[node] for node, offset in ahead.items() if offset == usual)
    findings = []
    for node, offset in ahead.items():
        difference = offset - usual
        known = within[node] + usual_within
        if abs(difference) - known > SKEW_S:
            way = "ahead of" if difference > 0 else "behind"
            findings.append(
                Finding(
                    node,
                    f"its clock is {abs(difference):.1f} s {way} that of the others (known to "
                    f"{known:.3f} s); from {MUNGE_S:.0f} s on Slurm refuses its messages",
                    "synchronise it: chronyc makestep, and see why chronyd or ntpd does not",
                )
            )
    widest = max(ahead.values()) - min(ahead.values())
    return Check("clocks", f"{widest:.3f} s apart at most", tuple(findings))
