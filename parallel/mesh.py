"""Process groups: this module is the only place that creates them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.flight_recorder import record_nccl


def join_ranks(timeout: timedelta) -> torch.device:
    """Join the job's ranks (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

    Returns:
        This rank's device. A collective that waits longer than `timeout` fails the job.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    # The store of torchrun outlives the ranks: those of an attempt must not find what earlier ones
    # have left there.
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    ranks = {"store": store, "rank": rank, "world_size": size, "timeout": timeout}
    if torch.cuda.is_available():
        # Slurm shows a rank all GPUs of its node, or its own alone.
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        record_nccl(os.environ)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **ranks)
        return device
    dist.init_process_group("gloo", **ranks)
    return torch.device("cpu")


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is the only rank of a job, on the CPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Mesh:
    """The ranks of a job, arranged three times; neighbours along the last axis are closest.

    Attributes:
        tokens: (pp, dp_replicate, dp_shard, cp, tp), as the layout names them: who works on
            which tokens.
        weights: (pp, dp_replicate, fsdp, tp), fsdp = dp_shard x cp: who stores which part of a
            dense weight.
        experts: (pp, dp_replicate, expert_shard, ep), expert_shard x ep = dp_shard x cp x tp: the
            same of an expert's weight. Expert parallelism is folded over the axes that split
            tokens, and needs no ranks of its own.
        sequence: (others, ring, ulysses, tp), ring x ulysses = cp: who exchanges heads and who
            keys; None where no rank exchanges heads.
        pipeline_ends: the ranks of the first and the last place of this rank's pipeline, where
            they hold copies of a tied embedding; None where this rank is neither.
    """

    tokens: DeviceMesh
    weights: DeviceMesh
    experts: DeviceMesh
    sequence: DeviceMesh | None
    pipeline_ends: dist.ProcessGroup | None

    @classmethod
    def build(
        cls,
        device: torch.device,
        *,
        pp: int = 1,
        dp_replicate: int = 1,
        dp_shard: int = 1,
        cp: int = 1,
        ulysses: int = 1,
        ep: int = 1,
        tp: int = 1,
        ends_share_a_weight: bool = False,
    ) -> "Mesh":
        """Arrange all ranks of the job; `ep` must divide dp_shard x cp x tp, and `ulysses` cp.
        Collective.

        Args:
            ends_share_a_weight: whether to make groups of pipelines' ends, which takes a while on
                thousands of ranks.
        """
        assert pp * dp_replicate * dp_shard * cp * tp == dist.get_world_size()
        assert dp_shard * cp * tp % ep == 0

        alone = _arrange(device, all=dist.get_world_size(), alone=1).get_group("alone")

        def arrange(**axes: int) -> DeviceMesh:
            """Axes of one rank share a group: each costs threads and, with NCCL, a communicator."""
            wide = {name: size for name, size in axes.items() if size > 1} or axes
            groups = dict(zip(wide, _arrange(device, **wide).get_all_groups(), strict=True))
            return DeviceMesh.from_group(
                [groups.get(name, alone) for name in axes],
                device.type,
                torch.arange(dist.get_world_size()).view(*axes.values()),
                mesh_dim_names=tuple(axes),
            )

        tokens = arrange(pp=pp, dp_replicate=dp_replicate, dp_shard=dp_shard, cp=cp, tp=tp)
        sequence = None
        if ulysses > 1:
            others = pp * dp_replicate * dp_shard
            sequence = arrange(others=others, ring=cp // ulysses, ulysses=ulysses, tp=tp)
        return cls(
            tokens,
            arrange(pp=pp, dp_replicate=dp_replicate, fsdp=dp_shard * cp, tp=tp),
            arrange(pp=pp, dp_replicate=dp_replicate, expert_shard=dp_shard * cp * tp // ep, ep=ep),
            sequence,
            _pipeline_ends(tokens) if ends_share_a_weight else None,
        )

    @property
    def pp(self) -> DeviceMesh:
        return self.weights["pp"]

    @property
    def tp(self) -> DeviceMesh:
        """The ranks that share a layer; of the same tree as `shards_of_weights`."""
        return self.weights["tp"]

    @property
    def cp(self) -> DeviceMesh:
        return self.tokens["cp"]

    @property
    def ep(self) -> DeviceMesh:
        return self.experts["ep"]

    @property
    def shards_of_weights(self) -> DeviceMesh:
        """Where FSDP shards dense weights: (fsdp), or (dp_replicate, fsdp)."""
        if self.weights["dp_replicate"].size() > 1:
            return self.weights["dp_replicate", "fsdp"]
        return self.weights["fsdp"]

    @property
    def shards_of_experts(self) -> DeviceMesh:
        """Where FSDP shards the weights of experts, besides `ep`."""
        if self.experts["dp_replicate"].size() > 1:
            return self.experts["dp_replicate", "expert_shard"]
        return self.experts["expert_shard"]

    @property
    def data_rank(self) -> int:
        """This rank's place among those that take different sequences of a global batch."""
        replicate = self.tokens["dp_replicate"].get_local_rank()
        return replicate * self.tokens["dp_shard"].size() + self.tokens["dp_shard"].get_local_rank()

    @property
    def data_ranks(self) -> int:
        return self.tokens["dp_replicate"].size() * self.tokens["dp_shard"].size()


def _arrange(device: torch.device, **axes: int) -> DeviceMesh:
    return init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))


def _pipeline_ends(tokens: DeviceMesh) -> dist.ProcessGroup | None:
    pipelines = tokens.mesh.flatten(1)
    ends = [[first, last] for first, last in zip(*pipelines[[0, -1]].tolist(), strict=True)]
    group, _ = dist.new_subgroups_by_enumeration(ends)
    return group


def release_groups() -> None:
    """Destroy all groups but that of all ranks, so that others can be arranged. Collective."""
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    _name_later_groups_anew()


def _name_later_groups_anew() -> None:
    """Give no group from now on the name of an earlier one, whose addresses are in gloo's store.

    torch names what it splits off the group of all ranks by its ranks and by the number of groups
    that there are (https://github.com/pytorch/pytorch/pull/189073).
    """
    name_of = dist.distributed_c10d._hash_ranks_to_str
    dist.distributed_c10d._hash_ranks_to_str = lambda ranks: name_of([*ranks, -1])


def limit_collectives(timeout: timedelta) -> None:
    """Let a collective of any group of this rank that waits longer than `timeout` fail.

    Groups do not inherit the timeout that the ranks have joined with.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)
