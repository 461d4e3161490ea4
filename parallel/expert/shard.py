"""Spread the experts of a model over the `ep` axis."""

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from parallel.comm import Communicator
from parallel.expert.dispatch import AllToAllDispatch, on_local_experts
from parallel.mesh import Mesh


def shard_experts(moe_layers: list[Any], mesh: Mesh) -> Communicator:
    """Give each rank of `mesh.ep` its share of every layer's experts, and route tokens there.

    The weights become DTensors sharded on their first dimension, so that checkpoints keep one
    name for an expert wherever it lives.

    Returns:
        The communicator that all these layers share, with its count of calls and bytes.
    """
    comm = Communicator(mesh.ep.get_group(), "ep")
    for moe in moe_layers:
        experts: nn.Module = moe.experts
        for name, weight in list(experts.named_parameters(recurse=False)):
            sharded = distribute_tensor(weight.detach(), mesh.ep, [Shard(0)], src_data_rank=None)
            assert isinstance(sharded, DTensor)
            experts.register_parameter(name, nn.Parameter(sharded))
        n_experts = next(experts.parameters()).shape[0]
        moe.dispatch = AllToAllDispatch(comm, n_experts)
        moe.experts.compute = on_local_experts(moe.experts.compute)
    return comm
