"""The files of Megatron's IndexedDataset: tokens in PREFIX.bin, where they begin in PREFIX.idx.

megatron-core's `datasets/indexed_dataset.py`, version 1, little-endian:

    9 bytes               MMIDIDX and two zero bytes
    uint64                version
    uint8                 code of the tokens' type
    uint64, uint64        sequences, entries of the last array
    int32 [sequences]     tokens of each sequence
    int64 [sequences]     bytes of .bin before each sequence
    int64 [documents + 1] sequences before each document, and all of them
    int8 [sequences]      modes, in multimodal datasets only
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
# Codes 6 and 7 are of floats, which are no tokens.
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}
# Megatron stores larger vocabularies in 32 bits, though 16 would do up to 65536.
VOCABULARY_OF_INT32 = 65500
LONGEST_SEQUENCE = np.iinfo(np.int32).max
# So many entries of the index are looked at together.
BLOCK = 1 << 16


def files_of(prefix: Path) -> tuple[Path, Path]:
    """The .bin and .idx of a prefix, which may be given as the name of either file."""
    if prefix.suffix in (".bin", ".idx"):
        prefix = prefix.with_suffix("")
    return prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")


class DatasetWriter:
    """An IndexedDataset of a known number of documents, each of which is one sequence.

    The three arrays of the index are written side by side, so that nothing is kept in memory.
    Leaving it by no exception checks that all documents were added.
    """

    def __init__(self, bin_path: Path, idx_path: Path, documents: int, vocab_size: int) -> None:
        code = 8 if vocab_size < VOCABULARY_OF_INT32 else 4
        self.dtype = DTYPES[code]
        self._documents = documents
        self._added = self._bytes = 0
        self._bin = bin_path.open("wb")
        self._idx = idx_path.open("wb")
        self._idx.write(HEADER.pack(MAGIC, VERSION, code, documents, documents + 1))

    def add(self, tokens: NDArray[Any], lengths: NDArray[np.int64]) -> None:
        """
        Args:
            tokens: of some documents, one after another.
            lengths: of each of them.
        """
        ends = self._bytes + np.cumsum(lengths) * self.dtype.itemsize
        pointers = ends - lengths * self.dtype.itemsize
        at_lengths = HEADER.size + 4 * self._added
        at_pointers = HEADER.size + 4 * self._documents + 8 * self._added
        self._write(at_lengths, lengths.astype("<i4"))
        self._write(at_pointers, pointers.astype("<i8"))
        self._bin.write(tokens.astype(self.dtype.newbyteorder("<")).tobytes())
        self._added += len(lengths)
        self._bytes += len(tokens) * self.dtype.itemsize

    def _write(self, place: int, array: NDArray[Any]) -> None:
        self._idx.seek(place)
        self._idx.write(array.tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        with self._bin, self._idx:
            if kind is None:
                assert self._added == self._documents, "all documents are added"
                self._idx.seek(0, os.SEEK_END)
                for first in range(0, self._documents + 1, BLOCK):
                    last = min(first + BLOCK, self._documents + 1)
                    self._idx.write(np.arange(first, last, dtype="<i8").tobytes())


@dataclass(frozen=True)
class Dataset:
    """An IndexedDataset on disk; its arrays are mapped, so that no document costs memory.

    Attributes:
        lengths: [sequences] int32, in tokens.
        pointers: [sequences] int64, bytes before each; the sequences lie without gaps.
        document_ends: [documents] int64, sequences up to the end of each document.
        tokens: all of them.
    """

    lengths: NDArray[Any]
    pointers: NDArray[Any]
    document_ends: NDArray[Any]
    tokens: NDArray[Any]

    def documents(self) -> Iterator[NDArray[Any]]:
        """The tokens of each document, the sequences of one joined, as views of the file."""
        start = 0
        for first in range(0, len(self.document_ends), BLOCK):
            for stop in self._tokens_before(self.document_ends[first : first + BLOCK]).tolist():
                yield self.tokens[start:stop]
                start = stop

    def _tokens_before(self, sequences: NDArray[Any]) -> NDArray[np.int64]:
        """How many tokens lie before each of these sequences; one past the last is allowed."""
        before = np.full(len(sequences), len(self.tokens), np.int64)
        inside = sequences < len(self.pointers)
        before[inside] = self.pointers[sequences[inside]] // self.tokens.itemsize
        return before


def open_dataset(prefix: Path) -> Dataset:
    """The IndexedDataset of a prefix, or of one of its files; the whole index is checked.

    Raises:
        DataError: a file is missing or cut, is no index, of another version or type, holds modes
            of a multimodal dataset, or sequences and documents that do not fit together.
    """
    bin_path, idx_path = files_of(prefix)
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise DataError(f"{path}: no such file; name the prefix of a .bin and a .idx")
    dtype, sequences, documents = _read_header(idx_path)
    raw = np.memmap(idx_path, np.uint8, mode="r")

    def array(place: int, count: int, kind: str) -> NDArray[Any]:
        return np.frombuffer(raw, kind, count, place)

    lengths = array(HEADER.size, sequences, "<i4")
    pointers = array(HEADER.size + 4 * sequences, sequences, "<i8")
    bounds = array(HEADER.size + 12 * sequences, documents + 1, "<i8")
    _check_bounds(bounds, sequences, idx_path)
    size = _check_sequences(lengths, pointers, dtype, idx_path)
    found = bin_path.stat().st_size
    if found != size:
        raise DataError(
            f"{bin_path}: cut, or not the one of {idx_path}: it has {found} bytes, the index says "
            f"{size}. Copy both again"
        )
    # An empty file cannot be mapped.
    tokens = np.memmap(bin_path, dtype, mode="r") if size else np.zeros(0, dtype)
    return Dataset(lengths, pointers, bounds[1:], np.asarray(tokens))


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    """The type of the tokens, the number of sequences, and of documents."""
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if header[: len(MAGIC)] != MAGIC:
        raise DataError(
            f"{path}: not the index of a Megatron IndexedDataset: it begins with "
            f"{header[: len(MAGIC)]!r} instead of {MAGIC!r}"
        )
    if len(header) < HEADER.size:
        raise DataError(f"{path}: cut: {len(header)} bytes are less than a header. Copy it again")
    _, version, code, sequences, bounds = HEADER.unpack(header)
    if version != VERSION:
        raise DataError(f"{path}: version {version} of the format; only {VERSION} can be read")
    if code not in DTYPES:
        allowed = ", ".join(f"{known} ({dtype})" for known, dtype in DTYPES.items())
        raise DataError(f"{path}: tokens of type {code}; allowed are {allowed}")
    size, found = HEADER.size + 12 * sequences + 8 * bounds, path.stat().st_size
    if found == size + sequences and sequences:
        raise DataError(
            f"{path}: a multimodal dataset, with a mode for each sequence; only text can be read"
        )
    if found != size or not bounds:
        raise DataError(
            f"{path}: cut or damaged: it has {found} bytes, but {sequences} sequences and "
            f"{bounds - 1} documents take {size}. Copy it again"
        )
    return DTYPES[code].newbyteorder("<"), sequences, bounds - 1


def _check_bounds(bounds: NDArray[Any], sequences: int, path: Path) -> None:
    is_whole = bounds[0] == 0 and bounds[-1] == sequences
    for first in range(0, len(bounds), BLOCK):
        is_whole = is_whole and bool(np.all(np.diff(bounds[first : first + BLOCK + 1]) >= 0))
    if not is_whole:
        raise DataError(
            f"{path}: damaged: its documents do not divide its {sequences} sequences. Copy it again"
        )


def _check_sequences(
    lengths: NDArray[Any], pointers: NDArray[Any], dtype: np.dtype[Any], path: Path
) -> int:
    """The bytes of all sequences, which must lie one after another."""
    size = 0
    for first in range(0, len(lengths), BLOCK):
        block = lengths[first : first + BLOCK].astype(np.int64)
        ends = size + np.cumsum(block) * dtype.itemsize
        wrong = (block < 0) | (pointers[first : first + BLOCK] != ends - block * dtype.itemsize)
        if wrong.any():
            sequence = first + int(wrong.argmax())
            raise DataError(
                f"{path}: damaged: sequence {sequence} (counted from 0) does not begin where the "
                "one before it ends. Copy it again"
            )
        size = int(ends[-1])
    return size
