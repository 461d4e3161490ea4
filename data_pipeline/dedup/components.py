"""Connected components of a graph in files, in bounded memory.

The nodes are cut into ranges, and ranges are taken from the highest to the lowest (Sibeyn, as in
Dementiev, Sanders, Schultes and Sibeyn 2004, "Engineering an External Memory Minimum Spanning Tree
Algorithm"). Of a range, a forest of disjoint sets is in memory. An edge within it joins two sets;
an edge to a lower node becomes the link of its set, or, where the set has one, an edge between the
two lower nodes, which waits in the file of a lower range. Then the ranges are taken upwards: a set
without a link is named after its smallest node, one with a link has the name of what it links to.

Each edge is read once in each range that it passes through on its way down, whatever the shape of
the graph; alternating large-star and small-star sorts all edges a dozen times.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.errors import DataError

SCHEMA = pa.schema({"node": pa.int64(), "root": pa.int64()})
# Of a node in memory: 4 bytes for its parent, 8 for its link or name, 1 for whether it has edges.
BYTES_PER_NODE = 13
# Of an edge in a batch, measured: what pyarrow reads, is sorted by range, and is passed on.
BYTES_PER_EDGE = 320
LEAST_MEMORY = 1 << 20
MOST_NODES_IN_RANGE = 1 << 31

Pairs = NDArray[np.int64]


def connected_components(
    edges: Sequence[Path], nodes: int, out: Path, memory: int = 1 << 30
) -> int:
    """Write the component of each node that has an edge to another one.

    Scratch files of up to 16 bytes an edge and 20 a node lie beside `out` meanwhile.

    Args:
        edges: Parquet files with int64 columns `a` and `b`, nodes from 0 to `nodes` - 1, in any
            order and as often as you like.
        out: a Parquet file of `node`, ascending, and `root`, the smallest node of its component.
        memory: bytes for what is in memory, besides the interpreter and a row group of the edges.

    Returns:
        How many components of two or more nodes there are.

    Raises:
        DataError: an edge names a node that does not exist, or the memory is too small.
    """
    if memory < LEAST_MEMORY:
        raise DataError(f"memory={memory} is not allowed: it is at least {LEAST_MEMORY} bytes")
    with TemporaryDirectory(dir=out.parent, prefix=".components-") as folder:
        ranges = _Ranges(Path(folder), nodes, memory)
        if ranges.count > 1:
            for pairs in _read_edges(edges, nodes, ranges.batch):
                ranges.add_edges(pairs)
        for number in reversed(range(ranges.count)):
            pending = (
                ranges.pending_edges(number)
                if ranges.count > 1
                else _read_edges(edges, nodes, ranges.batch)
            )
            _join_range(ranges, number, pending)
        with pq.ParquetWriter(out, SCHEMA) as writer:
            return sum(_name_range(ranges, number, writer) for number in range(ranges.count))


class _Ranges:
    """Ranges of equally many nodes, and the files of each.

    Attributes:
        batch: how many pairs of nodes are in memory at a time.
    """

    def __init__(self, folder: Path, nodes: int, memory: int) -> None:
        self.size = min(memory // 2 // BYTES_PER_NODE, MOST_NODES_IN_RANGE, max(nodes, 1))
        self.count = -(-nodes // self.size)
        self.batch = memory // 4 // BYTES_PER_EDGE
        self._folder, self._nodes = folder, nodes

    def span(self, number: int) -> tuple[int, int]:
        """The first node of a range and the one behind its last."""
        return number * self.size, min((number + 1) * self.size, self._nodes)

    def add_edges(self, pairs: Pairs) -> None:
        """Keep edges, of which the second node is the lower one, for the range of the first."""
        self._add("edges", pairs[:, 0], pairs)

    def pending_edges(self, number: int) -> Iterator[Pairs]:
        return self._take("edges", number)

    def add_questions(self, pairs: Pairs) -> None:
        """Ask the range of each first node for its name, on behalf of the second node."""
        self._add("questions", pairs[:, 0], pairs)

    def questions(self, number: int) -> Iterator[Pairs]:
        return self._take("questions", number)

    def add_answers(self, pairs: Pairs) -> None:
        """Tell the range of each first node that its name is the second node."""
        self._add("answers", pairs[:, 0], pairs)

    def answers(self, number: int) -> Iterator[Pairs]:
        return self._take("answers", number)

    def save_parents(self, number: int, parent: NDArray[np.int32]) -> None:
        with self._path("parents", number).open("wb") as file:
            parent.tofile(file)

    def load_parents(self, number: int) -> NDArray[np.int32]:
        path = self._path("parents", number)
        parent = np.fromfile(path, np.int32)
        path.unlink()
        return parent

    def _path(self, kind: str, number: int) -> Path:
        return self._folder / f"{kind}-{number:06d}"

    def _add(self, kind: str, nodes: NDArray[np.int64], pairs: Pairs) -> None:
        numbers = nodes // self.size
        order = np.argsort(numbers, kind="stable")
        cuts = np.searchsorted(numbers[order], np.arange(self.count + 1))
        for number in np.flatnonzero(np.diff(cuts)).tolist():
            with self._path(kind, number).open("ab") as file:
                pairs[order[cuts[number] : cuts[number + 1]]].tofile(file)

    def _take(self, kind: str, number: int) -> Iterator[Pairs]:
        path = self._path(kind, number)
        if path.exists():
            with path.open("rb") as file:
                yield from _read_pairs(file, self.batch)
            path.unlink()


def _read_pairs(file: BinaryIO, batch: int) -> Iterator[Pairs]:
    while len(pairs := np.fromfile(file, np.int64, 2 * batch)):
        yield pairs.reshape(-1, 2)


def _read_edges(files: Sequence[Path], nodes: int, batch: int) -> Iterator[Pairs]:
    """The edges between two different nodes, the greater one first."""
    for path in files:
        with pq.ParquetFile(path) as file:
            # One by one: over several row groups, pyarrow keeps all that it has read.
            for group in range(file.num_row_groups):
                for records in file.iter_batches(batch, [group], ["a", "b"], use_threads=False):
                    pairs = np.stack([records[name].to_numpy() for name in ("a", "b")], 1)
                    _refuse_unknown_nodes(pairs, nodes, path)
                    pairs.sort(axis=1)
                    yield pairs[pairs[:, 0] != pairs[:, 1], ::-1]


def _refuse_unknown_nodes(pairs: Pairs, nodes: int, path: Path) -> None:
    if len(pairs) and (pairs.min() < 0 or pairs.max() >= nodes):
        lowest, highest = int(pairs.min()), int(pairs.max())
        raise DataError(
            f"{path}: has edges of nodes {lowest} to {highest}; allowed are 0 to {nodes - 1}"
        )


def _join_range(ranges: _Ranges, number: int, edges: Iterator[Pairs]) -> None:
    """Join the nodes of a range; pass on what joins lower ones, and ask for the names of links."""
    from data_pipeline.dedup.component_kernels import flatten_range, join_edges

    first, end = ranges.span(number)
    parent = np.arange(end - first, dtype=np.int32)
    link = np.full(end - first, -1, np.int64)
    for pairs in edges:
        ranges.add_edges(join_edges(np.ascontiguousarray(pairs), first, parent, link))
    flatten_range(parent)
    ranges.save_parents(number, parent)
    for start in range(0, len(link), ranges.batch):
        linked = start + np.flatnonzero(link[start : start + ranges.batch] >= 0)
        ranges.add_questions(np.stack([link[linked], first + linked], 1))


def _name_range(ranges: _Ranges, number: int, writer: pq.ParquetWriter) -> int:
    """Write the names of a range's nodes, and answer the ranges that have links to them.

    Returns:
        How many components have their smallest node in the range.
    """
    first, end = ranges.span(number)
    parent = ranges.load_parents(number)
    has_edge = np.zeros(end - first, np.bool_)
    name = np.arange(first, end)
    for pairs in ranges.answers(number):
        name[pairs[:, 0] - first] = pairs[:, 1]
        has_edge[pairs[:, 0] - first] = True
    for pairs in ranges.questions(number):
        asked = pairs[:, 0] - first
        has_edge[asked] = True
        ranges.add_answers(np.stack([pairs[:, 1], name[parent[asked]]], 1))
    for start in range(0, end - first, ranges.batch):
        parents = parent[start : start + ranges.batch]
        joined = np.flatnonzero(parents != np.arange(start, start + len(parents)))
        has_edge[start + joined] = True
        has_edge[parents[joined]] = True
    components = 0
    for start in range(0, end - first, ranges.batch):
        nodes = start + np.flatnonzero(has_edge[start : start + ranges.batch])
        roots = name[parent[nodes]]
        components += int((roots == first + nodes).sum())
        writer.write_table(pa.table([first + nodes, roots], SCHEMA))
    return components
