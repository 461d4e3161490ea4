"""Tensors in a safetensors file, written as a stream that is hashed on its way.

The format (https://github.com/huggingface/safetensors): 8 bytes with the header's length, a JSON
header with each tensor's dtype, shape and place, then the tensors' bytes. The safetensors library
itself wants a file on this machine, or all bytes at once.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import IO, Any

import torch
from torch import Tensor

WRITE_BYTES = 1 << 26
ALIGNMENT = 8
LENGTH = struct.Struct("<Q")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class HashedStream:
    """Passes bytes on to a file, counted and hashed.

    Attributes:
        size: bytes so far.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, content: Any) -> None:
        view = memoryview(content).cast("B")
        for start in range(0, len(view), WRITE_BYTES):
            part = view[start : start + WRITE_BYTES]
            self._file.write(part)
            self._hash.update(part)
        self.size += len(view)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def write_tensors(stream: HashedStream, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, which are contiguous and in the memory of the CPU."""
    stream.write(_header_of(tensors))
    for tensor in tensors.values():
        stream.write(tensor.view(-1).view(torch.uint8).numpy())


def first_byte(file: IO[bytes]) -> int:
    """Where the tensors begin."""
    file.seek(0)
    return LENGTH.size + int(LENGTH.unpack(file.read(LENGTH.size))[0])


def read_rows(file: IO[bytes], start: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """The tensor of that shape whose first byte is at `start`.

    Raises:
        EOFError: the file ends before it does.
    """
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        file.seek(start)
        raw: Any = tensor.view(-1).view(torch.uint8).numpy()
        view = memoryview(raw)
        while view:
            count = file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise EOFError("the file ends in the middle of a tensor")
            view = view[count:]
    return tensor


def _header_of(tensors: Mapping[str, Tensor]) -> bytes:
    entries, place = {}, 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.nbytes],
        }
        place += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    return LENGTH.pack(len(header)) + header
