"""What a rank holds of a tensor that is no DTensor."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.metadata import TensorProperties as Properties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class Region:
    """A box out of a tensor, for `CheckpointStore`: it saves and fills `local`.

    Ranks may hold the same region; together they hold the whole tensor, and no regions overlap
    that are not the same. It speaks torch's protocol of what can be in a distributed checkpoint
    (`torch.distributed.checkpoint._extension`'s `_Checkpointable`).

    Args:
        local: what this rank has.
        shape: of the whole tensor.
        offsets: where the region begins, per dimension.
    """

    def __init__(self, local: Tensor, shape: Sequence[int], offsets: Sequence[int]) -> None:
        assert len(shape) == len(offsets) == local.dim()
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

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.local
