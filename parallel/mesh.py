"""Process groups: this module is the only place that creates them."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def join_ranks(timeout: timedelta) -> torch.device:
    """Join the job's ranks (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

    Returns:
        This rank's device. A collective that waits longer than `timeout` fails the job.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
        return device
    dist.init_process_group("gloo", timeout=timeout)
    return torch.device("cpu")


@dataclass(frozen=True)
class Mesh:
    """The ranks of a job, arranged twice.

    Dense weights see the axes (dp_replicate, dp_shard). Expert weights see the same ranks as
    (dp_replicate, expert_shard, ep), with dp_shard = expert_shard x ep: expert parallelism is
    folded over data parallelism and needs no ranks of its own.
    """

    dense: DeviceMesh
    expert: DeviceMesh

    @classmethod
    def build(cls, device: torch.device, *, dp_replicate: int, dp_shard: int, ep: int) -> "Mesh":
        """Arrange dp_replicate x dp_shard ranks; `ep` must divide dp_shard. Collective."""
        assert dp_replicate * dp_shard == dist.get_world_size()
        assert dp_shard % ep == 0
        return cls(
            init_device_mesh(
                device.type, (dp_replicate, dp_shard), mesh_dim_names=("dp_replicate", "dp_shard")
            ),
            init_device_mesh(
                device.type,
                (dp_replicate, dp_shard // ep, ep),
                mesh_dim_names=("dp_replicate", "expert_shard", "ep"),
            ),
        )

    @property
    def shards_of_dense(self) -> DeviceMesh:
        """Where dense weights are sharded: (dp_shard), or (dp_replicate, dp_shard)."""
        return self.dense if self.dense.size(0) > 1 else self.dense["dp_shard"]

    @property
    def shards_of_experts(self) -> DeviceMesh:
        """Where expert weights are sharded besides `ep`."""
        if self.expert.size(0) > 1:
            return self.expert["dp_replicate", "expert_shard"]
        return self.expert["expert_shard"]

    @property
    def ep(self) -> DeviceMesh:
        return self.expert["ep"]

    @property
    def data_rank(self) -> int:
        """This rank's place among those that take different sequences of a global batch."""
        return dist.get_rank()

    @property
    def data_ranks(self) -> int:
        return dist.get_world_size()
