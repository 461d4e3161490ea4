"""A copy, in the memory of the CPU, of what this rank writes of a checkpoint."""

from collections.abc import Mapping
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem

from pretrain.checkpoint.buffers import empty_tensors
from pretrain.checkpoint.index import Index, StoredTensor
from pretrain.checkpoint.manifest import FileEntry, attempt_prefix, index_name
from pretrain.checkpoint.plan import PackedParts, Part, merge, share_out
from pretrain.checkpoint.region import Region, held
from pretrain.checkpoint.target import Target
from pretrain.checkpoint.tensor_file import NAMES, HashedStream, write_tensors


class Staging:
    """Plans once who writes what, then copies and writes it as often as is wanted.

    What several ranks hold is left to one of them, so that they share the bytes between them.
    """

    def __init__(self, tensors: Mapping[str, Tensor | Region], attempt: int) -> None:
        """Collective. Allocates as much memory as this rank will write."""
        self._attempt = attempt
        # On rank 0, until it has been made bytes of.
        self._index: Index | bytes | None = None
        self._items = self._plan(tensors)
        wanted = {name: (_size(item), _dtype(item)) for name, item in self._items.items()}
        self._buffers = empty_tensors(wanted, pin=torch.cuda.is_available())

    def copy(self, tensors: Mapping[str, Tensor | Region]) -> None:
        """Take over the values that the tensors have now."""
        for name, item in self._items.items():
            self._buffers[name].copy_(held(tensors[item.index.fqn]), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def write(self, folder: Target) -> dict[str, FileEntry]:
        """Write the copy to this rank's file, and on rank 0 the index, durably.

        Returns:
            What has been written, by name.
        """
        written = {}
        if self._buffers:
            name = self._file_of(dist.get_rank())
            written[name] = _create(folder / name, lambda file: write_tensors(file, self._buffers))
        if self._index is not None:
            content = self._index if isinstance(self._index, bytes) else self._index.to_bytes()
            self._index = content
            name = index_name(self._attempt)
            written[name] = _create(folder / name, lambda file: file.write(content))
        return written

    def _file_of(self, rank: int) -> str:
        return f"{attempt_prefix(self._attempt)}rank-{rank:05d}.safetensors"

    def _plan(self, tensors: Mapping[str, Tensor | Region]) -> dict[str, WriteItem]:
        """What this rank writes, by its name in the file."""
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(tensors))
        items = [item for item in planner.create_local_plan().items if _size(item).numel()]
        parts = [_part(item) for item in items]
        packed = PackedParts.of(parts)
        ranks = dist.get_world_size()
        everyones: list[Any] | None = [None] * ranks if dist.get_rank() == 0 else None
        dist.gather_object(packed, everyones)
        stays_of_ranks: list[Any] | None = None
        if everyones:
            everything = merge(everyones, [self._file_of(rank) for rank in range(ranks)])
            stays = share_out(everything)
            self._index = everything.only(stays)
            stays_of_ranks = everything.by_file(stays)
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, stays_of_ranks)
        return {
            part.name: item
            for part, item, stays in zip(parts, items, mine[0], strict=True)
            if stays
        }


def _create(file: Target, write: Any) -> FileEntry:
    stream: HashedStream | None = None

    def fill(opened: IO[bytes]) -> None:
        nonlocal stream
        stream = HashedStream(opened)
        write(stream)

    file.create(fill)
    assert stream is not None
    return FileEntry(stream.size, stream.sha256)


def _data(item: WriteItem) -> Any:
    assert item.tensor_data is not None
    return item.tensor_data


def _size(item: WriteItem) -> torch.Size:
    size: torch.Size = _data(item).chunk.sizes
    return size


def _dtype(item: WriteItem) -> torch.dtype:
    dtype: torch.dtype = _data(item).properties.dtype
    return dtype


def _part(item: WriteItem) -> Part:
    data = _data(item)
    tensor = StoredTensor(item.index.fqn, NAMES[_dtype(item)], tuple(data.size))
    return Part(tensor, tuple(data.chunk.offsets), tuple(data.chunk.sizes))
