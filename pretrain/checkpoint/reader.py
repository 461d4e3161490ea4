"""Read a checkpoint, whatever layout wrote it, through torch's planner of distributed loading.

Each rank plans for itself, of the chunks that it needs alone.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import IO

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.tensor import DTensor

from pretrain.checkpoint.index import Chunk, Index
from pretrain.checkpoint.region import Region, held
from pretrain.checkpoint.target import Target
from pretrain.checkpoint.tensor_file import DTYPES, first_byte, read_rows
from pretrain.errors import AttemptError, UserError

NAMED_AT_MOST = 4


def refuse_another_model(
    checkpoint: Target, index: Index, wanted: Mapping[str, Tensor | Region]
) -> None:
    """Raises UserError if a checkpoint does not have all of these tensors, in their shapes."""
    problems = []
    for name, tensor in wanted.items():
        stored = index.by_name.get(name)
        # What is empty is not stored.
        if stored is None and tensor.numel():
            problems.append(f"{name} is not in it")
        elif stored is not None and stored.shape != tuple(tensor.shape):
            problems.append(f"{name} is {list(stored.shape)} there, {list(tensor.shape)} here")
    if problems:
        more = (
            f"\n  and {len(problems) - NAMED_AT_MOST} more" if len(problems) > NAMED_AT_MOST else ""
        )
        raise UserError(
            f"{checkpoint} is a checkpoint of another model:\n  "
            + "\n  ".join(problems[:NAMED_AT_MOST])
            + f"{more}\nUse the settings it was trained with, or another --run-dir"
        )


def read_tensors(checkpoint: Target, index: Index, into: Mapping[str, Tensor | Region]) -> None:
    """Fill tensors, which may be DTensors of any layout, in place, with what this rank has of them.

    Raises:
        AttemptError: a file can no longer be read.
    """
    wanted = {name: tensor for name, tensor in into.items() if tensor.numel()}
    chunks = {name: _chunks_for(index, name, tensor) for name, tensor in wanted.items()}
    places = {
        MetadataIndex(name, chunk.offsets): chunk for name in chunks for chunk in chunks[name]
    }
    by_file: dict[str, list[tuple[Chunk, ReadItem]]] = defaultdict(list)
    # A planner knows no tensor but torch's own, its plan does.
    plan = create_default_local_load_plan(wanted, _metadata(index, chunks))
    for item in plan.items:
        chunk = places[item.storage_index]
        by_file[chunk.file].append((chunk, item))
    for name, reads in by_file.items():
        file = checkpoint / name
        try:
            with file.open() as opened:
                _read(opened, reads, wanted)
        except (OSError, EOFError) as error:
            raise AttemptError(f"{file} cannot be read: {error}") from error


def _chunks_for(index: Index, name: str, tensor: Tensor | Region) -> list[Chunk]:
    """Those of a tensor in which there is something of this rank's part of it."""
    if not isinstance(tensor, DTensor | Region):
        return index.chunks(name, [0] * tensor.dim(), tensor.shape)
    (local,) = tensor.__create_chunk_list__()
    return index.chunks(name, local.offsets, local.sizes)


def _metadata(index: Index, chunks: Mapping[str, list[Chunk]]) -> Metadata:
    return Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(dtype=DTYPES[index.by_name[name].dtype]),
                torch.Size(index.by_name[name].shape),
                [
                    ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                    for chunk in of_tensor
                ],
            )
            for name, of_tensor in chunks.items()
        }
    )


def _read(
    file: IO[bytes],
    reads: list[tuple[Chunk, ReadItem]],
    into: Mapping[str, Tensor | Region],
) -> None:
    begin = first_byte(file)
    for chunk, item in sorted(reads, key=lambda read: read[0].start):
        target = held(into[item.dest_index.fqn])
        for dim, (offset, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            target = target.narrow(dim, offset, length)
        part = _read_part(file, begin + chunk.start, chunk, item.storage_offsets, item.lengths)
        target.copy_(part)


def _read_part(
    file: IO[bytes], start: int, chunk: Chunk, offsets: torch.Size, lengths: torch.Size
) -> Tensor:
    """The part of a chunk; along its first dimension no more than that is read."""
    dtype = DTYPES[chunk.dtype]
    if not chunk.sizes:
        return read_rows(file, start, dtype, torch.Size())
    inner = torch.Size(chunk.sizes[1:])
    start += offsets[0] * inner.numel() * dtype.itemsize
    part = read_rows(file, start, dtype, torch.Size([lengths[0], *inner]))
    for dim in range(1, len(inner) + 1):
        part = part.narrow(dim, offsets[dim], lengths[dim])
    return part
