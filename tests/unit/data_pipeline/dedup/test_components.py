"""Components over files are those of networkx, in the memory that was allowed."""

import json
import subprocess
import sys
from pathlib import Path

import networkx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dedup import components
from data_pipeline.dedup.components import connected_components
from data_pipeline.errors import DataError
from tests.ranks import ROOT


def _write(path: Path, edges: np.ndarray) -> Path:
    columns = edges.reshape(-1, 2).astype(np.int64).T
    pq.write_table(pa.table(dict(zip("ab", columns, strict=True))), path)
    return path


def _roots(path: Path) -> dict[int, int]:
    table = pq.read_table(path)
    return dict(zip(table["node"].to_pylist(), table["root"].to_pylist(), strict=True))


def _expected(edges: list[tuple[int, int]]) -> dict[int, int]:
    graph = networkx.Graph((a, b) for a, b in edges if a != b)
    return {
        node: min(component)
        for component in networkx.connected_components(graph)
        for node in component
    }


@pytest.mark.parametrize("nodes_in_range", [1, 2, 7, 100])
@settings(deadline=None, max_examples=40)
@given(
    edges=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 59)), max_size=120),
    files=st.integers(1, 3),
)
def test_any_graph_in_ranges_of_any_size(
    tmp_path_factory: pytest.TempPathFactory,
    nodes_in_range: int,
    edges: list[tuple[int, int]],
    files: int,
) -> None:
    folder = tmp_path_factory.mktemp("graph")
    paths = [
        _write(folder / f"{number}.parquet", np.array(edges[number::files], np.int64))
        for number in range(files)
    ]
    expected = _expected(edges)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(components, "MOST_NODES_IN_RANGE", nodes_in_range)
        count = connected_components(paths, 60, folder / "out.parquet")
    found = _roots(folder / "out.parquet")
    assert list(found) == sorted(expected)
    assert found == expected
    assert count == len(set(expected.values()))
    assert {path.name for path in folder.iterdir()} == {*(p.name for p in paths), "out.parquet"}


GROWTH = """
import json, sys
from pathlib import Path
from data_pipeline.dedup.components import connected_components

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

folder = Path(sys.argv[1])
connected_components([folder / "small.parquet"], 10, folder / "small-roots.parquet")
before = resident("VmRSS")
count = connected_components(
    sorted(folder.glob("edges-*.parquet")), int(sys.argv[2]), folder / "roots.parquet",
    memory=int(sys.argv[3]),
)
print(json.dumps({"components": count, "growth": resident("VmHWM") - before}))
"""


def test_a_long_chain_and_a_star_in_less_memory_than_their_nodes(tmp_path: Path) -> None:
    """2.5 million edges each: the chain in random order, the star around its highest node."""
    nodes, memory = 5_000_000, 16 << 20
    half = nodes // 2
    draw = np.random.default_rng(1)
    chain = np.stack([np.arange(half - 1), np.arange(1, half)], 1)
    chain = draw.permutation(half)[chain]  # neighbours anywhere
    star = np.stack([np.arange(half, nodes - 1), np.full(half - 1, nodes - 1)], 1)
    edges = draw.permutation(np.concatenate([chain, star]))
    for number, part in enumerate(np.array_split(edges, 8)):
        _write(tmp_path / f"edges-{number}.parquet", part)
    _write(tmp_path / "small.parquet", np.array([[1, 2], [2, 3]]))
    command = [sys.executable, "-c", GROWTH, str(tmp_path), str(nodes), str(memory)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    report = json.loads(done.stdout)
    assert report["components"] == 2
    table = pq.read_table(tmp_path / "roots.parquet")
    assert (table["node"].to_numpy() == np.arange(nodes)).all()
    assert (table["root"].to_numpy() == np.where(np.arange(nodes) < half, 0, half)).all()
    # What pyarrow holds of a row group and of its own comes on top.
    assert report["growth"] < memory + (32 << 20) < 12 * nodes


def test_an_unknown_node_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "edges.parquet", np.array([[1, 2], [7, 10]]))
    with pytest.raises(DataError, match=r"edges\.parquet: has edges of nodes 1 to 10; allowed are"):
        connected_components([path], 10, tmp_path / "out.parquet")
