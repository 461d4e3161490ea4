"""Compare settings and weights of 3 ranks; run by test_agreement.py.

Arguments: the folder for results.
"""

import json
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from parallel.agreement import DisagreementError, check_copies, check_same, replicated
from parallel.mesh import join_ranks, limit_collectives

SETTINGS = {"train": {"seed": 0, "steps": 9}, "model": {"layer_pattern": ["linear", "softmax"]}}
OTHERS = {"train": {"seed": 1, "steps": 9}, "model": {"layer_pattern": ["softmax"]}}


def error_of(check, *arguments) -> str:
    try:
        check(*arguments)
    except DisagreementError as error:
        return str(error)
    return ""


def weight() -> Tensor:
    return torch.arange(200_000.0)


def with_one_bit_changed() -> Tensor:
    changed = weight()
    changed.view(torch.int32)[150_000] ^= 1
    return changed


def with_two_elements_swapped() -> Tensor:
    changed = weight()
    changed[[3, 150_000]] = changed[[150_000, 3]]
    return changed


def cases(rank: int) -> Iterator[tuple[str, str]]:
    first_two, first_last, last_two = map(dist.new_group, ([0, 1], [0, 2], [1, 2]))
    world = dist.group.WORLD
    limit_collectives(timedelta(minutes=1))

    yield "equal settings", error_of(check_same, "the configuration", SETTINGS)
    settings = OTHERS if rank == 1 else SETTINGS
    yield "other settings", error_of(check_same, "the configuration", settings)

    # Each rank begins with another group.
    mine = [
        [("a", weight(), first_two), ("b", weight().bfloat16(), first_last)],
        [("c", torch.ones(()), last_two), ("a", weight(), first_two)],
        [("b", weight().bfloat16(), first_last), ("c", torch.ones(()), last_two)],
    ]
    yield "equal weights", error_of(check_copies, mine[rank])

    for name, changed in (("bit", with_one_bit_changed()), ("swap", with_two_elements_swapped())):
        second = changed if rank == 2 else weight()
        copies = [("first", weight(), world), ("second", second, world)]
        yield name, error_of(check_copies, copies)

    pair = with_one_bit_changed() if rank == 1 else weight()
    copies = [] if rank == 2 else [("a", pair, first_two)]
    yield "outside the group", error_of(check_copies, copies)

    names = ("a",) if rank == 0 else ("a", "b")
    copies = [(name, weight(), world) for name in names]
    yield "a weight too few", error_of(check_copies, copies)

    mesh = init_device_mesh("cpu", (3, 1), mesh_dim_names=("dp_replicate", "fsdp"))
    local = with_one_bit_changed() if rank == 1 else weight()
    sharded = DTensor.from_local(local, mesh, [Replicate(), Shard(0)], run_check=False)
    yield "replicas", error_of(check_copies, replicated([("sharded", sharded), ("a", local)]))


def main() -> None:
    join_ranks(timedelta(minutes=1))
    rank = dist.get_rank()
    results = json.dumps(dict(cases(rank)))
    Path(sys.argv[1], f"{rank}.json").write_text(results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
