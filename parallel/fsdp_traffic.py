"""Counts and times what FSDP sends: the collectives that it calls for weights and gradients."""

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from parallel.comm import all_gather_single, reduce_scatter_single
from parallel.stopwatch import Stopwatch

# (axis, kind) -> bytes that this rank sent to other ranks, as `Communicator.bytes`.
Sent = Counter[tuple[str, str]]


def count_traffic(unit: Any, mesh: DeviceMesh, sent: Sent, waited: Stopwatch) -> None:
    """Add to `sent` what an `FSDPModule` sends over the one or two axes of its mesh.

    Args:
        waited: runs while nothing is computed because of it. Not for the sums over replicas; and
            not on GPUs, where FSDP has streams of its own and waits for them unseen.
    """
    unit.set_custom_all_gather(_AllGather(mesh, sent, waited))
    unit.set_custom_reduce_scatter(_ReduceScatter(mesh, sent, waited))


class _Counted:
    def __init__(self, mesh: DeviceMesh, sent: Sent, waited: Stopwatch) -> None:
        *replicate, self.axis = mesh.mesh_dim_names or ()
        self.replicate = {axis: mesh[axis].size() for axis in replicate}
        self.sent = sent
        self.waited = waited

    def waiting(self, x: Tensor) -> AbstractContextManager[None]:
        return nullcontext() if x.is_cuda else self.waited.running(x.device)

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Counted):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> Any:
        self.sent[self.axis, "all_gather"] += input_tensor.nbytes * (group.size() - 1)
        with self.waiting(output_tensor):
            return all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class _ReduceScatter(_Counted):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        self.sent[self.axis, "reduce_scatter"] += output_tensor.nbytes * (group.size() - 1)
        # What is left is then summed over the replicas.
        for axis, size in self.replicate.items():
            self.sent[axis, "all_reduce"] += 2 * output_tensor.nbytes * (size - 1) // size
        with self.waiting(output_tensor):
            return reduce_scatter_single(
                output_tensor, input_tensor, op=op, group=group, async_op=async_op
            )
