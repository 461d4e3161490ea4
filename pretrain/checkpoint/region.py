"""What a rank holds of a tensor that is no DTensor."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.metadata import TensorProperties as Properties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from parallel.fsdp import local_tensor


class Region:
    """A box out of a tensor, for `CheckpointStore`: it saves and fills `local`.

    Ranks may hold the same region; together they hold the whole tensor, and no regions overlap
    that are not the same. torch's planners of distributed checkpoints ask it as they ask a DTensor.

    Args:
        local: what this rank has.
        shape: of the whole tensor.
        offsets: where the region begins, per dimension.
        make: to save only: makes `local`, which is then one on the device "meta". Of what several
            ranks hold, only the one that writes it is asked.
    """

    def __init__(
        self,
        local: Tensor,
        shape: Sequence[int],
        offsets: Sequence[int],
        make: Callable[[], Tensor] | None = None,
    ) -> None:
        assert len(shape) == len(offsets) == local.dim()
        self.make = make
        self.local, self.shape, self.offsets = local, torch.Size(shape), torch.Size(offsets)

    def numel(self) -> int:
        """Elements of the whole tensor."""
        return self.shape.numel()

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(self.offsets, self.local.shape)]

    def __create_write_items__(self, name: str, region: "Region") -> list[WriteItem]:
        (chunk,) = self.__create_chunk_list__()
        data = TensorWriteData(chunk, Properties.create_from_tensor(self.local), self.shape)
        return [WriteItem(MetadataIndex(name, self.offsets), WriteItemType.SHARD, tensor_data=data)]


def held(tensor: Tensor | Region) -> Tensor:
    """What this rank has of a tensor, in the same memory unless it is made."""
    if isinstance(tensor, Region):
        return tensor.make() if tensor.make else tensor.local
    return local_tensor(tensor.detach())
