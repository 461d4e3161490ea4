"""Read a checkpoint through torch's distributed checkpointing, whatever layout wrote it."""

from collections import defaultdict
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from pretrain.checkpoint.manifest import Chunk, Manifest
from pretrain.checkpoint.target import Target
from pretrain.checkpoint.tensor_file import DTYPES, read_rows
from pretrain.errors import UserError

NAMED_AT_MOST = 4


def read_tensors(
    checkpoint: Target, manifest: Manifest, into: dict[str, Tensor], *, alone: bool = False
) -> None:
    """Fill tensors, which may be DTensors of any layout, in place. Collective unless `alone`.

    Raises:
        UserError: the checkpoint has no such tensors; nothing has been changed then.
    """
    # What is empty is not stored.
    into = {name: tensor for name, tensor in into.items() if tensor.numel()}
    _refuse_another_model(checkpoint, manifest, into)
    dcp.load(
        into,
        storage_reader=_Reader(checkpoint, manifest),
        planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        no_dist=alone,
    )


def _refuse_another_model(
    checkpoint: Target, manifest: Manifest, wanted: dict[str, Tensor]
) -> None:
    problems = []
    for name, tensor in wanted.items():
        stored = manifest.tensors.get(name)
        if stored is None:
            problems.append(f"{name} is not in it")
        elif stored.shape != tuple(tensor.shape):
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


class _Reader(StorageReader):
    """Reads only the rows that a rank asks for, and nothing that could run code."""

    def __init__(self, checkpoint: Target, manifest: Manifest) -> None:
        self._checkpoint = checkpoint
        self._tensors = manifest.tensors

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=DTYPES[tensor.dtype]),
                    torch.Size(tensor.shape),
                    [
                        ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                        for chunk in tensor.chunks
                    ],
                )
                for name, tensor in self._tensors.items()
            },
            storage_data={
                MetadataIndex(name, chunk.offsets): (chunk, DTYPES[tensor.dtype])
                for name, tensor in self._tensors.items()
                for chunk in tensor.chunks
            },
        )

    def set_up_storage_reader(self, metadata: Metadata, *_: Any, **__: Any) -> None:
        self._stored: dict[MetadataIndex, tuple[Chunk, torch.dtype]] = metadata.storage_data

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self._stored[item.storage_index][0].file].append(item)
        for name, items in by_file.items():
            with (self._checkpoint / name).open() as file:
                for item in sorted(
                    items, key=lambda item: self._stored[item.storage_index][0].start
                ):
                    chunk, dtype = self._stored[item.storage_index]
                    part = _read_part(file, chunk, dtype, item.storage_offsets, item.lengths)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def reset(self, checkpoint_id: Any = None) -> None:
        """One reader is of one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


def _read_part(
    file: Any, chunk: Chunk, dtype: torch.dtype, offsets: torch.Size, lengths: torch.Size
) -> Tensor:
    """The part of a chunk; along its first dimension no more than that is read."""
    if not chunk.sizes:
        return read_rows(file, chunk.start, dtype, torch.Size())
    inner = torch.Size(chunk.sizes[1:])
    start = chunk.start + offsets[0] * inner.numel() * dtype.itemsize
    part = read_rows(file, start, dtype, torch.Size([lengths[0], *inner]))
    for dim in range(1, len(inner) + 1):
        part = part.narrow(dim, offsets[dim], lengths[dim])
    return part
