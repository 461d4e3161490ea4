"""A copy, in the memory of the CPU, of what this rank writes of a checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from pretrain.checkpoint.manifest import Chunk, FileEntry, StoredTensor
from pretrain.checkpoint.target import Target
from pretrain.checkpoint.tensor_file import NAMES, HashedStream, header_of, write_tensors


class Staging:
    """Plans once who writes what, then copies and writes it as often as is wanted.

    torch's planner leaves each part to one of the ranks that hold a copy of it, so that they share
    the bytes between them.

    Attributes:
        file: this rank's.
        tensors: on rank 0 what all ranks write, as a manifest describes it; else empty.
    """

    def __init__(self, tensors: Mapping[str, Tensor], attempt: int) -> None:
        """Collective. Allocates as much memory as this rank will write."""
        self.file = f"{attempt_prefix(attempt)}rank-{dist.get_rank():05d}.safetensors"
        self._planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._items = {_name(item): item for item in self._plan(tensors) if _size(item).numel()}
        self._buffers = {name: _buffer(item) for name, item in self._items.items()}
        self.tensors = self._describe()

    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the values that the tensors have now."""
        self._planner.set_up_planner(dict(tensors), is_coordinator=dist.get_rank() == 0)
        for name, item in self._items.items():
            source: Any = self._planner.resolve_data(item)
            self._buffers[name].copy_(source.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def write(self, folder: Target) -> FileEntry:
        """Write the copy to this rank's file, durably."""
        stream: HashedStream | None = None

        def fill(file: Any) -> None:
            nonlocal stream
            stream = HashedStream(file)
            write_tensors(stream, self._buffers)

        (folder / self.file).create(fill)
        assert stream is not None
        return FileEntry(stream.size, stream.sha256)

    def _plan(self, tensors: Mapping[str, Tensor]) -> list[WriteItem]:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self._planner.set_up_planner(dict(tensors), is_coordinator=rank == 0)
        plans: list[Any] | None = [None] * ranks if rank == 0 else None
        dist.gather_object(self._planner.create_local_plan(), plans)
        final: list[SavePlan | None] = [None]
        if plans:
            plans = self._planner.create_global_plan(plans)[0]
        dist.scatter_object_list(final, plans)
        assert final[0] is not None
        return self._planner.finish_plan(final[0]).items

    def _describe(self) -> dict[str, StoredTensor]:
        starts = header_of(self._buffers)[1]
        mine = [
            (
                item.index.fqn,
                NAMES[self._buffers[name].dtype],
                tuple(_data(item).size),
                Chunk(self.file, starts[name], _offsets(item), tuple(_size(item))),
            )
            for name, item in self._items.items()
        ]
        everyones: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
        dist.gather_object(mine, everyones or None)
        described: dict[str, StoredTensor] = {}
        for name, dtype, shape, chunk in (entry for of_rank in everyones for entry in of_rank):
            others = described[name].chunks if name in described else ()
            described[name] = StoredTensor(dtype, shape, (*others, chunk))
        return described


def attempt_prefix(attempt: int) -> str:
    """What the names of all files of an attempt begin with."""
    return f"attempt-{attempt:04d}-"


def _data(item: WriteItem) -> Any:
    assert item.tensor_data is not None
    return item.tensor_data


def _size(item: WriteItem) -> torch.Size:
    size: torch.Size = _data(item).chunk.sizes
    return size


def _offsets(item: WriteItem) -> tuple[int, ...]:
    return tuple(_data(item).chunk.offsets)


def _name(item: WriteItem) -> str:
    """Of the part in its file: the tensor's, and where the part begins if it is not the whole."""
    if _size(item) == _data(item).size:
        return item.index.fqn
    return f"{item.index.fqn}@{','.join(map(str, _offsets(item)))}"


def _buffer(item: WriteItem) -> Tensor:
    dtype = _data(item).properties.dtype
    return torch.empty(_size(item), dtype=dtype, pin_memory=torch.cuda.is_available())
