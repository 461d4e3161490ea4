"""Weights, gradients and optimizer state sharded over the data-parallel ranks (FSDP2)."""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from parallel.mesh import Mesh


def shard_weights(
    model: nn.Module,
    layers: list[nn.Module],
    experts: list[nn.Module],
    mesh: Mesh,
    dtype: torch.dtype,
) -> None:
    """Shard `model` in units of a layer; the experts are units of their own, on their own mesh.

    Computation runs in `dtype`; the sharded weights and every reduction stay in float32.
    Gradients are summed over the ranks, not averaged: a loss must be divided by the global
    number of tokens before backward.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        # Rotary angles come in float32 and have to stay so.
        cast_forward_inputs=False,
    )
    for unit in experts:
        # Dimension 0 belongs to `ep`; dimension 1 divides whatever the number of experts.
        fully_shard(
            unit,
            mesh=mesh.shards_of_experts,
            mp_policy=policy,
            shard_placement_fn=lambda _: Shard(1),
        )
    for unit in [*layers, model]:
        fully_shard(unit, mesh=mesh.shards_of_dense, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def local_tensor(weight: Tensor) -> Tensor:
    """The part of a weight that this rank stores."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def owned_region(weight: Tensor) -> tuple[slice, ...]:
    """Where `local_tensor(weight)` lies in the whole weight, per dimension."""
    if not isinstance(weight, DTensor):
        return tuple(slice(0, size) for size in weight.shape)
    shape, offset = compute_local_shape_and_global_offset(
        weight.shape, weight.device_mesh, weight.placements
    )
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
