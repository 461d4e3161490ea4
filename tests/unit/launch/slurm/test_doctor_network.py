"""What the doctor says of names, ports and clocks, and that it measures them."""

import socket
import threading
import time

import pytest

from launch.slurm.doctor import names, network
from launch.slurm.doctor.names import Names
from launch.slurm.doctor.network import Listener, Reached, Taken

ADDRESSES = {"a1": "10.0.0.1", "a2": "10.0.0.2", "a3": "10.0.0.3"}


def _names(node: str, **changed: object) -> Names:
    found = {name: (address,) for name, address in ADDRESSES.items()}
    found |= {address: (address,) for address in ADDRESSES.values()}
    interfaces = {"lo": "127.0.0.1", "eth0": ADDRESSES[node]}
    usual = {"hostname": node, "own": found[node], "found": found, "interfaces": interfaces}
    return Names(**usual | changed)  # type: ignore[arg-type]


def _all_names(**changed: Names) -> dict[str, Names]:
    return {node: _names(node) for node in ADDRESSES} | changed


@pytest.mark.parametrize("interface", [None, "eth0", "^lo,docker", "=eth0"])
def test_nothing_is_said_of_names_that_resolve_everywhere(interface: str | None) -> None:
    assert names.check(_all_names(), ADDRESSES, interface).findings == ()


def test_a_name_that_one_node_does_not_know_is_found_there() -> None:
    found = _names("a2").found | {"a3": ()}
    (finding,) = names.check(_all_names(a2=_names("a2", found=found)), ADDRESSES, None).findings
    assert finding.where == "a2"
    assert "the name a3 does not resolve here, and does on a1, a3" in finding.what


def test_a_name_that_nobody_knows_matters_only_if_its_address_is_a_name_too() -> None:
    addresses = ADDRESSES | {"a3": "a3.cluster"}

    def without_a3(**known: tuple[str, ...]) -> dict[str, Names]:
        own = {"own": ("10.0.0.3",)}
        return {
            node: _names(node, found=_names(node).found | {"a3": ()} | known, **own)
            for node in ADDRESSES
        }

    known = without_a3(**{"a3.cluster": ("10.0.0.3",)})
    assert names.check(known, addresses, None).findings == ()
    unknown = without_a3(**{"a3.cluster": ()})
    (finding,) = names.check(unknown, addresses, None).findings
    assert (finding.where, "nor does its NodeAddr a3.cluster" in finding.what) == (
        "a1, a2, a3",
        True,
    )


@pytest.mark.parametrize(
    ("own", "says"),
    [((), "its own host name a2 does not resolve"), (("127.0.1.1",), "resolves to 127.0.1.1")],
)
def test_a_node_that_would_send_others_to_themselves_needs_an_interface(
    own: tuple[str, ...], says: str
) -> None:
    measured = _all_names(a2=_names("a2", own=own))
    (finding,) = names.check(measured, ADDRESSES, None).findings
    assert (finding.where, says in finding.what) == ("a2", True)
    assert "there are eth0, lo" in finding.fix
    # gloo is told the name of an interface, but of no pattern.
    assert names.check(measured, ADDRESSES, "eth0").findings == ()
    assert len(names.check(measured, ADDRESSES, "^lo").findings) == 1


def test_nodes_that_all_are_one_machine_may_have_its_loopback() -> None:
    local = dict.fromkeys(ADDRESSES, "127.0.0.1")
    measured = {
        node: _names(
            node, own=("127.0.0.1",), found=dict.fromkeys([*ADDRESSES, "127.0.0.1"], ("127.0.0.1",))
        )
        for node in ADDRESSES
    }
    assert names.check(measured, local, None).findings == ()


def test_an_interface_that_is_not_there_is_told_with_those_that_are() -> None:
    (finding,) = names.check(_all_names(), ADDRESSES, "ib0").findings
    assert finding.where == "a1, a2, a3"
    assert "eth0, lo" in finding.fix
    # NCCL would take this prefix, gloo would not.
    assert len(names.check(_all_names(), ADDRESSES, "eth").findings) == 1


@pytest.mark.parametrize(
    ("wish", "meant"),
    [
        ("eth", ["eth0", "eth1"]),
        ("=eth", []),
        ("=eth1,lo", ["lo", "eth1"]),
        ("^lo,docker", ["eth0", "eth1", "ib0"]),
        ("^=eth0", ["lo", "eth1", "ib0", "docker0"]),
    ],
)
def test_patterns_of_interfaces_are_those_of_nccl(wish: str, meant: list[str]) -> None:
    assert names.interfaces_of(wish, ["lo", "eth0", "eth1", "ib0", "docker0"]) == meant


def test_this_machine_is_measured() -> None:
    found = names.measure({"localhost": "127.0.0.1", "no.such.host.invalid": "127.0.0.1"})
    assert found.found["localhost"] == ("127.0.0.1",)
    assert found.found["no.such.host.invalid"] == ()
    assert found.interfaces["lo"] == "127.0.0.1"
    assert names.announced(found, "lo") == "127.0.0.1"


def _reached(node: str, error: str | None = None, **more: float) -> Reached:
    return Reached(node=node, address=ADDRESSES[node], port=20001, error=error, **more)


def test_a_node_that_others_do_not_reach_is_named_once() -> None:
    measured = {
        "a1": [_reached("a2", "timed out"), _reached("a3")],
        "a2": [_reached("a1"), _reached("a3")],
        "a3": [_reached("a1"), _reached("a2", "timed out")],
    }
    (finding,) = network.check_ports(measured, {}).findings
    assert finding.where == "a2"
    assert finding.what == "a1, a3 cannot connect to it at 10.0.0.2, port 20001: timed out"


def test_a_node_that_reaches_nobody_is_the_one_to_blame() -> None:
    measured = {
        "a1": [_reached("a2"), _reached("a3", "No route to host")],
        "a2": [_reached("a1"), _reached("a3", "No route to host")],
        "a3": [_reached("a1", "No route to host"), _reached("a2", "No route to host")],
    }
    (finding,) = network.check_ports(measured, {}).findings
    assert finding.where == "a3"
    assert finding.what.startswith("cannot connect to a1, a2 (10.0.0.1:20001): No route")


def test_where_nobody_reaches_anybody_all_are_named() -> None:
    measured = {
        "a1": [_reached("a2", "refused")],
        "a2": [_reached("a1", "refused")],
    }
    where = [finding.where for finding in network.check_ports(measured, {}).findings]
    assert where == ["a1", "a2"]


def test_a_port_that_is_taken_is_told() -> None:
    taken = {"a1": Taken(port=20001, error="Address already in use")}
    measured = {"a1": [], "a2": [_reached("a1", "something else listens there")]}
    (finding,) = network.check_ports(measured, taken).findings
    assert finding.where == "a1"
    assert "port 20001, on which ranks meet, cannot be had: Address already in use" in finding.what


def _clocks(*ahead: float, within: float = 0.01) -> tuple[str, ...]:
    """Where clocks are found to be wrong, given how far each is ahead of the first node's."""
    nodes = list(ADDRESSES)[: len(ahead)]
    measured = {
        node: [_reached(nodes[0], ahead_s=-offset, within_s=within)]
        for node, offset in zip(nodes[1:], ahead[1:], strict=True)
    }
    check = network.check_clocks(measured, nodes[0])
    return tuple(f"{one.where}: {one.what.partition(' that')[0]}" for one in check.findings)


def test_the_clock_that_differs_from_most_is_found() -> None:
    assert _clocks(0, 0.2, -0.3) == ()
    assert _clocks(0, 90, 0) == ("a2: its clock is 90.0 s ahead of",)
    assert _clocks(0, 0, -90) == ("a3: its clock is 90.0 s behind",)
    # The first one itself.
    assert _clocks(0, 90, 90) == ("a1: its clock is 90.0 s behind",)
    assert _clocks(0, 90) == ("a2: its clock is 90.0 s ahead of",)


def test_a_clock_that_nobody_knows_better_is_not_found_fault_with() -> None:
    """Answers of a busy node come late: all that is known is that it is so far off at most."""
    assert _clocks(0, 4, 0, within=5) == ()


def test_clocks_are_compared_over_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener()
    listener.stage = 2
    same = network.connect("here", "127.0.0.1", listener.port, stage=2)
    assert same.error is None
    assert abs(same.ahead_s) <= same.within_s + 0.01
    real = time.time
    # The one that asks; the listener answers from another thread, and its clock is right.
    asking = threading.main_thread()

    def an_hour_behind() -> float:
        is_asking = threading.current_thread() is asking
        return real() - 3600 * is_asking

    monkeypatch.setattr(time, "time", an_hour_behind)
    off = network.connect("here", "127.0.0.1", listener.port, stage=2)
    assert abs(off.ahead_s - 3600) <= off.within_s + 0.01
    listener.close()


def test_a_port_where_nobody_listens_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert network.connect("here", "127.0.0.1", port).error == "Connection refused"


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 7, 100, 1000])
def test_everybody_is_connected_to_by_several_others(nodes: int) -> None:
    asked_by: dict[int, list[int]] = {number: [] for number in range(nodes)}
    for number in range(nodes):
        peers = network.peers_of(number, nodes)
        assert number not in peers
        assert len(peers) <= 11
        for peer in peers:
            asked_by[peer].append(number)
    assert all(len(others) >= min(2, nodes - 1) for others in asked_by.values())
    for number, others in asked_by.items():
        assert network.callers_of(number, nodes) == others
