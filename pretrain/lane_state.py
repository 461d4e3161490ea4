"""What rows remember beyond their step, as tensors of a checkpoint."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from parallel.mesh import Mesh
from parallel.segments.lanes import LaneMemory
from pretrain.checkpoint.index import Index
from pretrain.checkpoint.tensor_file import DTYPES

PREFIX, EARLIER = "lanes.", "lanes.earlier"
# Kept in the type of the computation.
OF_ACTIVATIONS = (".k", ".v", ".convolution")


class LaneState:
    """Saves and loads a `LaneMemory`: by name [tp, B, ...], of the B rows of a global batch, of
    which this rank has those of its rows and heads.

    Args:
        dtype: of the computation.
    """

    def __init__(
        self, lanes: LaneMemory | None, mesh: Mesh, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._lanes = lanes
        self._mesh, self._dtype, self._device = mesh, dtype, device
        self._filled: dict[str, Tensor] = {}

    def tensors(self) -> dict[str, Tensor]:
        """To be saved."""
        if self._lanes is None:
            return {}
        local = {PREFIX + name: value for name, value in self._lanes.values.items()}
        local[EARLIER] = torch.tensor(self._lanes.earlier, device=self._device)
        return {name: self._over_ranks(value) for name, value in local.items()}

    def to_fill(self, index: Index) -> dict[str, Tensor]:
        """Room for what a checkpoint has; nothing if this run has no use for it."""
        self._filled = {}
        if self._lanes is None or EARLIER not in index.by_name:
            return {}
        if problem := self._problem(index):
            if dist.get_rank() == 0:
                print(
                    f"warning: what rows remember cannot be loaded: {problem}; they begin anew",
                    flush=True,
                )
            return {}
        for name, stored in index.by_name.items():
            if name.startswith(PREFIX):
                shape = len(self._lanes.earlier), *stored.shape[2:]
                dtype = DTYPES[stored.dtype]
                self._filled[name] = torch.zeros(shape, dtype=dtype, device=self._device)
        return {name: self._over_ranks(value) for name, value in self._filled.items()}

    def take_over(self) -> None:
        """Let rows go on with what has been filled, or begin anew."""
        if self._lanes is None:
            return
        self._lanes.drop()
        if filled := self._filled:
            self._filled = {}
            self._lanes.earlier = filled.pop(EARLIER).tolist()
            self._lanes.values = {name.removeprefix(PREFIX): x for name, x in filled.items()}

    def _problem(self, index: Index) -> str | None:
        """Why what a checkpoint has does not fit."""
        assert self._lanes is not None
        here = self._mesh.tp.size(), len(self._lanes.earlier) * self._mesh.data_ranks
        for name, stored in index.by_name.items():
            if not name.startswith(PREFIX):
                continue
            if stored.shape[:2] != here:
                ranks, rows = stored.shape[:2]
                return (
                    f"it is of {rows} rows on {ranks} ranks of tp, here are {here[1]} on {here[0]}"
                )
            dtype = DTYPES[stored.dtype]
            if name.endswith(OF_ACTIVATIONS) and dtype != self._dtype:
                return f"it is {dtype}, and train.dtype is {self._dtype}"
        return None

    def _over_ranks(self, value: Tensor) -> Tensor:
        axes = {"dp_replicate": Shard(1), "dp_shard": Shard(1), "tp": Shard(0)}
        names = self._mesh.tokens.mesh_dim_names
        assert names is not None
        placements = [axes.get(name, Replicate()) for name in names]
        # It shares the storage of `value`.
        return DTensor.from_local(value[None], self._mesh.tokens, placements, run_check=False)
