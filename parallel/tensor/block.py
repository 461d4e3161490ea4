"""A block of a layer whose heads or hidden columns are shared out over the ranks of `tp`.

Tensor parallelism with sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198, section
4.2.2): between blocks a rank holds a part of the sequence; in a block, all of it and a part of the
weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from parallel.comm import Communicator
from parallel.overlap import LateGradient, begin


def shard_weight(block: nn.Module, path: str, mesh: DeviceMesh, dim: int) -> None:
    """Keep an equal part along `dim` of a weight: it becomes a DTensor with its whole shape.

    FSDP may shard the part again along the same dimension, into parts that differ: torch tells
    such weights by `_StridedShard`, which places, checkpoints and `full_tensor` respect.
    """
    module_path, _, name = path.rpartition(".")
    weight = block.get_parameter(path).detach()
    part = distribute_tensor(weight, mesh, [Shard(dim)], src_data_rank=None)
    block.get_submodule(module_path).register_parameter(name, nn.Parameter(part))


class ShardedBlock:
    """Takes the place of `block.forward`: a part of the sequence in, the same part out.

    The block itself computes on all tokens with this rank's weights, and knows of neither. It may
    use its weights in any way; the sum of its results over ranks must be the whole result.
    In the backward pass, the gradient of x travels while those of the projections are computed.

    Args:
        token_dim: the dimension of x that is split. A block that treats each token alone takes 0,
            which needs no copy, whatever the tokens' order.
        projections: the names of the linear layers that x goes through, each once.
        rows: for weights that are not sharded, by their name in the block: the rows to compute
            with.
    """

    def __init__(
        self,
        block: nn.Module,
        comm: Communicator,
        token_dim: int,
        projections: Sequence[str],
        rows: Mapping[str, slice] | None = None,
    ) -> None:
        self.compute = block.forward
        self.comm = comm
        self.token_dim = token_dim
        self.projections: list[Any] = [block.get_submodule(name) for name in projections]
        self.rows = dict(rows or {})
        self.owners = [
            (f"{path}.{name}".lstrip("."), module, name)
            for path, module in block.named_modules()
            for name, _ in module.named_parameters(recurse=False)
        ]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [.., tokens / ranks, ..] -> the same shape."""
        arriving = begin(
            x,
            partial(self.comm.start_all_gather, dim=self.token_dim),
            partial(self.comm.start_reduce_scatter, dim=self.token_dim),
        )
        with self._local_weights(), self._late_gradients():
            partial_sum = self.compute(arriving(), *args, **kwargs)
        return self.comm.reduce_scatter(partial_sum, self.token_dim)

    @contextmanager
    def _local_weights(self) -> Iterator[None]:
        """The block's weights as plain tensors: this rank's parts of those that are shared out."""
        stored = [module._parameters[name] for _, module, name in self.owners]
        for (path, module, name), weight in zip(self.owners, stored, strict=True):
            module._parameters[name] = self._local(path, weight)
        try:
            yield
        finally:
            for (_, module, name), weight in zip(self.owners, stored, strict=True):
                module._parameters[name] = weight

    @contextmanager
    def _late_gradients(self) -> Iterator[None]:
        for linear in self.projections:
            linear.forward = LateGradient(linear.weight)
        try:
            yield
        finally:
            for linear in self.projections:
                del linear.forward

    def _local(self, path: str, weight: Any) -> Any:
        if isinstance(weight, DTensor):
            return weight.to_local()
        return weight[self.rows[path]] if path in self.rows else weight
