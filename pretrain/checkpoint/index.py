"""Which part of which tensor lies where in a checkpoint.

Thousands of ranks write millions of parts, in a few patterns. As columns of numbers, compressed,
a part takes a byte or two; as an object, or in JSON, it takes hundreds.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.checkpoint.tensor_file import DTYPES

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class StoredTensor:
    """
    Attributes:
        dtype: as safetensors names it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, stored in one piece.

    Attributes:
        file: its name.
        start: bytes of other tensors that lie before it in the file.
        dtype: as safetensors names it.
        offsets, sizes: which part it is, per dimension.
    """

    file: str
    start: int
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Index:
    """The chunks of each file, one after the other, in the order in which they lie there.

    Attributes:
        tensors, files: what the columns count.
        tensor: (chunks,) what a chunk is a part of.
        file: (chunks,) where it lies, ascending.
        offsets, sizes: (chunks, dims) which part it is. Tensors of fewer dimensions have offsets of
            0 and sizes of 1 behind their own.
    """

    tensors: Sequence[StoredTensor]
    files: Sequence[str]
    tensor: Integers
    file: Integers
    offsets: Integers
    sizes: Integers

    @classmethod
    def from_bytes(cls, content: bytes) -> "Index":
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            columns = dict(file)
        described = zip(
            *(columns[f"tensor_{what}"].tolist() for what in ("name", "dtype", "dims", "shape")),
            strict=True,
        )
        return cls(
            [StoredTensor(name, dtype, (*shape[:dims],)) for name, dtype, dims, shape in described],
            columns["file_name"].tolist(),
            *(columns[f"chunk_{what}"] for what in ("tensor", "file", "offsets", "sizes")),
        )

    def to_bytes(self) -> bytes:
        """An .npz file with nothing pickled in it."""
        shapes = [tensor.shape for tensor in self.tensors]
        columns: dict[str, Any] = {
            "tensor_name": np.array([tensor.name for tensor in self.tensors], np.str_),
            "tensor_dtype": np.array([tensor.dtype for tensor in self.tensors], np.str_),
            "tensor_dims": np.array([len(shape) for shape in shapes], np.int64),
            "tensor_shape": padded(shapes, self.sizes.shape[1], 1),
            "file_name": np.array(self.files, np.str_),
            "chunk_tensor": self.tensor,
            "chunk_file": self.file,
            "chunk_offsets": self.offsets,
            "chunk_sizes": self.sizes,
        }
        content = io.BytesIO()
        np.savez_compressed(content, **columns)
        return content.getvalue()

    def only(self, chosen: NDArray[np.bool_]) -> "Index":
        """The index of these chunks alone."""
        columns = (self.tensor, self.file, self.offsets, self.sizes)
        return Index(self.tensors, self.files, *(column[chosen] for column in columns))

    def by_file(self, column: NDArray[Any]) -> list[NDArray[Any]]:
        """A column's rows of each file."""
        return np.split(column, np.searchsorted(self.file, np.arange(1, len(self.files))))

    @cached_property
    def by_name(self) -> dict[str, StoredTensor]:
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def nbytes(self) -> Integers:
        """(chunks,)"""
        itemsizes = np.array([tensor.itemsize for tensor in self.tensors], np.int64)
        return self.sizes.prod(1) * itemsizes[self.tensor]

    def chunks(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> list[Chunk]:
        """Those that hold something of that part of a tensor."""
        rows, dims = self._rows[name], len(offsets)
        begins = self.offsets[rows, :dims]
        ends = begins + self.sizes[rows, :dims]
        wanted = np.array(offsets, np.int64)
        overlap = (begins < wanted + np.array(sizes, np.int64)) & (ends > wanted)
        return [
            Chunk(
                self.files[self.file[row]],
                int(self._starts[row]),
                self.by_name[name].dtype,
                tuple(self.offsets[row, :dims].tolist()),
                tuple(self.sizes[row, :dims].tolist()),
            )
            for row in rows[overlap.all(1)]
        ]

    @cached_property
    def _starts(self) -> Integers:
        before = self.nbytes.cumsum() - self.nbytes
        first = np.searchsorted(self.file, np.arange(len(self.files)))
        return before - before[first[self.file]]

    @cached_property
    def _rows(self) -> dict[str, Integers]:
        """Of the chunks of each tensor."""
        order = self.tensor.argsort(kind="stable")
        ends = np.searchsorted(self.tensor[order], np.arange(len(self.tensors)), side="right")
        return dict(zip(self.by_name, np.split(order, ends[:-1]), strict=True))


def padded(rows: Sequence[Sequence[int]], dims: int, value: int) -> Integers:
    """(rows, dims), with `value` behind what is shorter."""
    return np.array([(*row, *(value,) * (dims - len(row))) for row in rows], np.int64).reshape(
        len(rows), dims
    )
