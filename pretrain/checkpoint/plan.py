"""Which rank writes what of a checkpoint.

torch's planner does this with objects that rank 0 unpickles, compares and pickles again, one for
each part of each tensor on each rank: for 2048 ranks that takes minutes.
"""

import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.checkpoint.index import Index, Integers, StoredTensor, padded


@dataclass(frozen=True)
class Part:
    """Of a tensor, as a rank holds it.

    Attributes:
        offsets, sizes: which part it is, per dimension.
    """

    tensor: StoredTensor
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        """In a file: the tensor's, and where the part begins if it is not the whole."""
        if self.sizes == self.tensor.shape:
            return self.tensor.name
        return f"{self.tensor.name}@{','.join(map(str, self.offsets))}"


@dataclass(frozen=True)
class PackedParts:
    """What a rank holds, small enough to be sent by thousands of ranks to one.

    Attributes:
        tensors: of which the parts are, as compressed JSON: the same on many ranks.
        places: (parts, 2, dims) int64, compressed: offsets and sizes.
    """

    tensors: bytes
    places: bytes

    @classmethod
    def of(cls, parts: Sequence[Part]) -> "PackedParts":
        described = [(part.tensor.name, part.tensor.dtype, part.tensor.shape) for part in parts]
        dims = max((len(part.sizes) for part in parts), default=0)
        offsets = padded([part.offsets for part in parts], dims, 0)
        sizes = padded([part.sizes for part in parts], dims, 1)
        return cls(
            zlib.compress(json.dumps(described).encode()),
            zlib.compress(np.stack([offsets, sizes], 1).tobytes()),
        )


def merge(ranks: Sequence[PackedParts], files: Sequence[str]) -> Index:
    """The index of a checkpoint to which each rank would write all that it holds."""
    tensors, columns = _number(ranks)
    counts = [len(column) for column in columns]
    dims = max((len(tensor.shape) for tensor in tensors), default=0)
    offsets = np.zeros((sum(counts), dims), np.int64)
    sizes = np.ones_like(offsets)
    begin = 0
    for rank, count in zip(ranks, counts, strict=True):
        if count:
            rows = slice(begin, begin + count)
            places = np.frombuffer(zlib.decompress(rank.places), np.int64).reshape(count, 2, -1)
            offsets[rows, : places.shape[2]] = places[:, 0]
            sizes[rows, : places.shape[2]] = places[:, 1]
            begin += count
    file = np.repeat(np.arange(len(files)), counts)
    return Index(tensors, files, np.concatenate(columns), file, offsets, sizes)


def share_out(held: Index) -> NDArray[np.bool_]:
    """Leave each part that several ranks hold to the one that has the fewest bytes to write so far.

    Returns:
        (chunks,) which stay.
    """
    order, begins = _sort_copies(held)
    copies = np.diff(begins, append=len(order))
    stays = np.zeros(len(order), bool)
    stays[order[begins[copies == 1]]] = True
    load = np.bincount(held.file[stays], held.nbytes[stays], len(held.files))
    # The largest first: what is small then fills the gaps.
    shared = np.flatnonzero(copies > 1)
    for part in shared[np.argsort(-held.nbytes[order[begins[shared]]], kind="stable")]:
        rows = order[begins[part] : begins[part] + copies[part]]
        row = rows[load[held.file[rows]].argmin()]
        stays[row] = True
        load[held.file[row]] += held.nbytes[row]
    _check_whole(held.only(stays))
    return stays


def _number(ranks: Sequence[PackedParts]) -> tuple[list[StoredTensor], list[Integers]]:
    """All tensors, and for each rank of which of them its parts are."""
    numbers: dict[StoredTensor, int] = {}
    known: dict[bytes, Integers] = {}
    for rank in ranks:
        if rank.tensors not in known:
            of_parts = [
                numbers.setdefault(StoredTensor(name, dtype, tuple(shape)), len(numbers))
                for name, dtype, shape in json.loads(zlib.decompress(rank.tensors))
            ]
            known[rank.tensors] = np.array(of_parts, np.int64)
    for name, count in Counter(tensor.name for tensor in numbers).items():
        assert count == 1, f"the ranks differ in {name}"
    return list(numbers), [known[rank.tensors] for rank in ranks]


def _sort_copies(held: Index) -> tuple[Integers, Integers]:
    """The chunks in an order in which copies of the same part lie together, and where in it each
    part begins.
    """
    shapes = padded([tensor.shape for tensor in held.tensors], held.sizes.shape[1], 1)
    # Of a part's first element, in its tensor.
    place = np.zeros(len(held.tensor), np.int64)
    for dim in range(shapes.shape[1]):
        place = place * shapes[held.tensor, dim] + held.offsets[:, dim]
    order = np.lexsort((place, held.tensor))
    is_first = np.ones(len(order), bool)
    is_first[1:] = (np.diff(held.tensor[order]) != 0) | (np.diff(place[order]) != 0)
    return order, np.flatnonzero(is_first)


def _check_whole(index: Index) -> None:
    """A tensor with a part missing, or with parts that overlap, would be loaded wrong."""
    stored = np.bincount(index.tensor, index.nbytes, len(index.tensors))
    for tensor, nbytes in zip(index.tensors, stored.tolist(), strict=True):
        assert nbytes == tensor.nbytes, f"{tensor.name}: {nbytes:.0f} of {tensor.nbytes} bytes"
