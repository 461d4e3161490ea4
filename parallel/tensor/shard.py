"""Share out the heads and hidden columns of a model's layers over the `tp` axis."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from parallel.comm import Communicator
from parallel.tensor.block import ShardedBlock, shard_weight

ROWS, COLUMNS = 0, 1


def shard_layers(layers: Iterable[Any], mesh: DeviceMesh, comm: Communicator) -> None:
    """Give each rank of `mesh` its share of every layer's heads and hidden columns.

    From then on a layer takes and returns this rank's part of the sequence, [B, T / ranks, d],
    and still the whole `documents` and `rotation`. Norms, routers and experts see that part.
    A weight that is no DTensor afterwards has on each rank a part of its gradient; their sum is
    the whole.

    Args:
        layers: `Layer` modules. Sizes that the ranks do not divide are refused with the
            configuration.
        mesh: one axis; FSDP's must be of the same tree of meshes.
        comm: that of the axis.
    """
    for layer in layers:
        if layer.attention is not None:
            _shard_attention(layer.attention, mesh, comm)
        if layer.gated_delta is not None:
            _shard_gated_delta(layer.gated_delta, mesh, comm)
        if layer.mlp is not None:
            _shard_swiglu(layer.mlp, mesh, comm)
        if layer.moe is not None and layer.moe.shared_expert is not None:
            _shard_swiglu(layer.moe.shared_expert, mesh, comm)


def _shard_attention(attention: Any, mesh: DeviceMesh, comm: Communicator) -> None:
    queries = ["q_proj"] if attention.gate_proj is None else ["q_proj", "gate_proj"]
    _shard(attention, _weights(queries), mesh, ROWS)
    key_heads = attention.k_proj.out_features // attention.head_dim
    keys = ["k_proj", "v_proj"]
    rows = _shard_key_heads(attention, _weights(keys), key_heads, mesh)
    _shard(attention, ["o_proj.weight"], mesh, COLUMNS)
    attention.forward = ShardedBlock(attention, comm, 1, queries + keys, rows)


def _shard_gated_delta(gated_delta: Any, mesh: DeviceMesh, comm: Communicator) -> None:
    values = ["v_proj", "z_proj", "b_proj", "a_proj"]
    _shard(gated_delta, [*_weights(values), "v_conv", "A_log", "dt_bias"], mesh, ROWS)
    key_heads = gated_delta.k_proj.out_features // gated_delta.key_dim
    keys = ["q_proj", "k_proj"]
    of_keys = [*_weights(keys), "q_conv", "k_conv"]
    rows = _shard_key_heads(gated_delta, of_keys, key_heads, mesh)
    _shard(gated_delta, ["o_proj.weight"], mesh, COLUMNS)
    gated_delta.forward = ShardedBlock(gated_delta, comm, 1, values + keys, rows)


def _shard_swiglu(swiglu: Any, mesh: DeviceMesh, comm: Communicator) -> None:
    projections = ["gate", "up"]
    _shard(swiglu, _weights(projections), mesh, ROWS)
    _shard(swiglu, ["down.weight"], mesh, COLUMNS)
    swiglu.forward = ShardedBlock(swiglu, comm, 0, projections)


def _shard_key_heads(
    block: nn.Module, weights: Sequence[str], heads: int, mesh: DeviceMesh
) -> dict[str, slice]:
    """Share out heads that serve several others each.

    Fewer heads than ranks stay whole on all of them.

    Returns:
        Then, which rows of each weight serve this rank's share of the others.
    """
    ranks = mesh.size()
    if heads % ranks == 0:
        _shard(block, weights, mesh, ROWS)
        return {}
    head = mesh.get_local_rank() * heads // ranks
    rows = {}
    for path in weights:
        size = block.get_parameter(path).shape[0] // heads
        rows[path] = slice(head * size, (head + 1) * size)
    return rows


def _shard(block: nn.Module, weights: Sequence[str], mesh: DeviceMesh, dim: int) -> None:
    for path in weights:
        shard_weight(block, path, mesh, dim)


def _weights(linears: Sequence[str]) -> list[str]:
    return [f"{name}.weight" for name in linears]
