"""Spread the experts of a model over the `ep` axis."""

from typing import Any, Literal

from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from parallel.comm import Communicator
from parallel.expert.deepep import DeepEPDispatch
from parallel.expert.dispatch import AllToAllDispatch, on_local_experts
from parallel.mesh import Mesh

Dispatcher = Literal["all_to_all", "deepep"]


def shard_experts(
    moe_layers: list[Any], mesh: Mesh, dispatcher: Dispatcher = "all_to_all"
) -> Communicator:
    """Give each rank of `mesh.ep` its share of every layer's experts, and route tokens there.

    The weights become DTensors sharded on their first dimension, so that checkpoints keep one
    name for an expert wherever it lives.

    Returns:
        The communicator that all these layers share, with its count of calls and bytes; DeepEP
        does not use it.
    """
    comm = Communicator(mesh.ep.get_group(), "ep")
    n_experts = moe_layers[0].experts.n_experts
    dispatch_by = {"all_to_all": AllToAllDispatch, "deepep": DeepEPDispatch}[dispatcher]
    dispatch = dispatch_by(comm, n_experts)
    for moe in moe_layers:
        experts: nn.Module = moe.experts
        for name, weight in list(experts.named_parameters(recurse=False)):
            sharded = distribute_tensor(weight.detach(), mesh.ep, [Shard(0)], src_data_rank=None)
            assert isinstance(sharded, DTensor)
            experts.register_parameter(name, nn.Parameter(sharded))
        moe.dispatch = dispatch
        moe.experts.compute = on_local_experts(moe.experts.compute)
    return comm
