"""What the doctor says of the adapters that NCCL sends over."""

from pathlib import Path

import pytest

from launch.slurm.doctor import adapters
from launch.slurm.doctor.adapters import Adapters

FOUR = {f"mlx5_{number}:1": "ACTIVE" for number in range(4)}


def _adapters(lockable: int | None = None, **changed: str) -> Adapters:
    states = {name.replace("_port_", ":"): state for name, state in changed.items()}
    return Adapters(ports=FOUR | states, lockable=lockable)


def _findings(hcas: str | None, **measured: Adapters) -> list[tuple[str, str]]:
    found = adapters.check({"a1": _adapters(), "a2": _adapters()} | measured, hcas).findings
    return [(finding.where, finding.what) for finding in found]


def test_ports_are_read_where_the_kernel_shows_them(tmp_path: Path) -> None:
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
    measured = adapters.measure(tmp_path)
    assert measured.ports == {"mlx5_0:1": "ACTIVE", "mlx5_1:1": "DOWN"}
    assert adapters.measure(tmp_path / "none").ports == {}


@pytest.mark.parametrize(
    ("wish", "meant"),
    [
        ("mlx5", ["mlx5_0:1", "mlx5_1:1", "mlx5_1:2", "mlx5_10:1"]),
        ("mlx5_1", ["mlx5_1:1", "mlx5_1:2", "mlx5_10:1"]),
        ("=mlx5_1", ["mlx5_1:1", "mlx5_1:2"]),
        ("=mlx5_1:2,mlx5_0", ["mlx5_0:1", "mlx5_1:2"]),
        ("^mlx5_1", ["mlx5_0:1"]),
        ("^=mlx5_1", ["mlx5_0:1", "mlx5_10:1"]),
    ],
)
def test_patterns_of_adapters_are_those_of_nccl(wish: str, meant: list[str]) -> None:
    there = ["mlx5_0:1", "mlx5_1:1", "mlx5_1:2", "mlx5_10:1"]
    assert adapters.ports_of(wish, there) == meant


@pytest.mark.parametrize("hcas", [None, "mlx5", "=mlx5_0,mlx5_3", "^mlx5_2"])
def test_nothing_is_said_of_adapters_that_are_there_and_active(hcas: str | None) -> None:
    assert _findings(hcas) == []


def test_an_adapter_that_the_profile_names_and_a_node_lacks_is_found() -> None:
    ((where, what),) = _findings("=mlx5_3,mlx5_7", a2=_adapters(mlx5_7_port_1="ACTIVE"))
    assert where == "a1"
    assert what.startswith("no adapter mlx5_7, which network.hcas = =mlx5_3,mlx5_7 names")


def test_a_port_that_is_down_is_found_if_it_would_be_used() -> None:
    down = _adapters(mlx5_2_port_1="DOWN")
    assert _findings("=mlx5_2", a2=down) == [("a2", "mlx5_2:1 is DOWN")]
    assert _findings("=mlx5_1", a2=down) == []
    # Nobody has named it: there are fewer than elsewhere.
    ((where, what),) = _findings(None, a2=down)
    assert (where, what[:33]) == ("a2", "3 active ports, elsewhere 4: all ")


def test_memory_that_may_not_be_locked_is_found_where_adapters_are_used() -> None:
    ((where, what),) = _findings(None, a2=_adapters(lockable=8 << 20))
    assert (where, what[:40]) == ("a2", "a rank may lock 8192 KiB of memory, and ")
    without = {node: Adapters(ports={}, lockable=8 << 20) for node in ("a1", "a2")}
    assert _findings(None, **without) == []
