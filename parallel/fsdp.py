"""Weights, gradients and optimizer state sharded over the data-parallel ranks (FSDP2)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from parallel.fsdp_traffic import Sent, count_traffic
from parallel.mesh import Mesh
from parallel.stopwatch import Stopwatch


def shard_weights(
    stage: Any,
    experts: Sequence[nn.Module],
    mesh: Mesh,
    dtype: torch.dtype,
    sent: Sent,
    waited: Stopwatch,
) -> None:
    """Shard the weights of `stage` in units of a layer.

    Computation runs in `dtype`; the sharded weights keep their own, and every reduction is float32
    or wider.
    Gradients are summed over the ranks, not averaged: a loss must be divided by the global
    number of tokens before backward.

    Args:
        stage: a `Stage`.
        experts: modules that are units of their own, on the mesh of the experts.
        sent: counts what is sent from now on.
        waited: runs while that keeps the computation waiting, see `count_traffic`.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.promote_types(dtype, torch.float32),
        # Rotary angles come in float32 and have to stay so.
        cast_forward_inputs=False,
    )
    # A pipeline runs many microbatches between two updates: it gathers the weights once for all.
    keep_gathered = mesh.pp.size() > 1
    units = list(stage.modules())
    for unit in experts:
        if unit in units:
            # Dimension 0 belongs to `ep`; dimension 1 divides whatever the number of experts.
            fully_shard(
                unit,
                mesh=mesh.shards_of_experts,
                mp_policy=policy,
                reshard_after_forward=not keep_gathered,
                shard_placement_fn=lambda _: Shard(1),
            )
    for unit in [*stage.model.layers.values(), stage]:
        fully_shard(
            unit,
            mesh=mesh.shards_of_weights,
            mp_policy=policy,
            reshard_after_forward=not keep_gathered,
        )
    _prefetch_next_layer(list(stage.model.layers.values()))
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            of_experts = any(module is unit for unit in experts)
            shards = mesh.shards_of_experts if of_experts else mesh.shards_of_weights
            count_traffic(module, shards, sent, waited)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _prefetch_next_layer(layers: Sequence[Any]) -> None:
    """Gather a layer's weights, with those of its experts, while the one before it computes."""
    units = [[unit for unit in layer.modules() if isinstance(unit, FSDPModule)] for layer in layers]
    for layer, next_units in zip(layers, units[1:], strict=False):
        layer.set_modules_to_forward_prefetch(next_units)
    for layer, previous_units in zip(layers[1:], units, strict=False):
        layer.set_modules_to_backward_prefetch(previous_units)


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
