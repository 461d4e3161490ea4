"""Memory for many tensors in few pieces."""

from collections.abc import Mapping

import torch
from torch import Tensor

PIECE = 1 << 32
# Of each tensor in its piece: that of cache lines, and a multiple of every type's size.
ALIGNMENT = 64


def empty_tensors(
    wanted: Mapping[str, tuple[torch.Size, torch.dtype]], pin: bool, piece: int = PIECE
) -> dict[str, Tensor]:
    """Contiguous uninitialised tensors of these shapes and types, in memory of the CPU.

    They share pieces of memory, which is given back with the last of them. torch pins powers of
    two, whatever it is asked for: tensors pinned by themselves take up to twice their bytes.

    Args:
        pin: whether GPUs are to copy to them in the background.
        piece: bytes that are allocated at a time, or as many as a larger tensor has.
    """
    nbytes = {name: size.numel() * dtype.itemsize for name, (size, dtype) in wanted.items()}
    places = {name: -(-n // ALIGNMENT) * ALIGNMENT for name, n in nbytes.items()}
    tensors = {}
    for names in _pack(places, piece):
        memory = torch.empty(sum(places[name] for name in names), dtype=torch.uint8, pin_memory=pin)
        parts = memory.split([places[name] for name in names])
        for name, part in zip(names, parts, strict=True):
            size, dtype = wanted[name]
            tensors[name] = part[: nbytes[name]].view(dtype).view(size)
    return {name: tensors[name] for name in wanted}


def _pack(sizes: Mapping[str, int], piece: int) -> list[list[str]]:
    """The names of each piece: first fit, the largest first."""
    packed: list[list[str]] = []
    left: list[int] = []
    for name in sorted(sizes, key=lambda name: sizes[name], reverse=True):
        fitting = (number for number, free in enumerate(left) if sizes[name] <= free)
        number = next(fitting, len(packed))
        if number == len(packed):
            packed.append([])
            left.append(piece)
        packed[number].append(name)
        left[number] -= sizes[name]
    return packed
