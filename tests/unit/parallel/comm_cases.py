"""Collectives against what they are defined to be; run on 2 ranks by test_comm.py.

Arguments: the folder for results.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.comm import CollectiveError, Communicator
from parallel.mesh import join_ranks, release_groups


def of_all_ranks(*shape: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """The tensor of each rank, known to all."""
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]


def check_gather_and_scatter(comm: Communicator, shape: tuple[int, ...], dim: int) -> None:
    parts = of_all_ranks(*shape)
    whole_gradients = of_all_ranks(*torch.cat(parts, dim).shape)
    part = parts[comm.rank].requires_grad_()
    gathered = comm.all_gather(part, dim)
    assert torch.equal(gathered, torch.cat(parts, dim))
    gathered.backward(whole_gradients[comm.rank])
    torch.testing.assert_close(part.grad, sum(whole_gradients).chunk(2, dim)[comm.rank])

    wholes = of_all_ranks(*gathered.shape)
    whole = wholes[comm.rank].requires_grad_()
    scattered = comm.reduce_scatter(whole, dim)
    torch.testing.assert_close(scattered, sum(wholes).chunk(2, dim)[comm.rank])
    part_gradients = of_all_ranks(*shape)
    scattered.backward(part_gradients[comm.rank])
    assert torch.equal(whole.grad, torch.cat(part_gradients, dim))


def check_a_single_row_is_gathered_without_a_copy(comm: Communicator) -> None:
    arrived = comm.start_all_gather(torch.ones(1, 3, 2), 1)
    assert arrived.wait().data_ptr() == arrived.out.data_ptr()


def check_all_reduce(comm: Communicator) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        values = of_all_ranks(3, dtype=dtype)
        torch.testing.assert_close(comm.all_reduce(values[comm.rank].clone()), sum(values))
    highest = comm.all_reduce(values[comm.rank].clone(), dist.ReduceOp.MAX)
    assert torch.equal(highest, torch.maximum(*values))


def check_all_to_all(comm: Communicator) -> None:
    sizes = [[1, 2], [0, 3]]
    rows = [torch.arange(3.0) + 10 * rank for rank in range(2)]
    x = rows[comm.rank].clone().requires_grad_()
    arrived = comm.all_to_all(x, [size[comm.rank] for size in sizes], sizes[comm.rank])
    expected = [rows[0][:1], torch.cat([rows[0][1:], rows[1]])]
    assert torch.equal(arrived, expected[comm.rank])
    (2 * arrived).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def counted(group: dist.ProcessGroup) -> dict[str, Any]:
    comm = Communicator(group, "tp")
    x = torch.ones(2, 6, 5, requires_grad=True)
    comm.reduce_scatter(comm.all_gather(x, 1), 1).sum().backward()
    comm.all_reduce(torch.ones(4))
    comm.exchange(torch.ones(3, 2), [1 + comm.rank] * 2, [1, 2])
    return {"calls": dict(comm.calls), "bytes": dict(comm.bytes)}


def check_groups_after_others_have_gone() -> None:
    """With the name of the group before, one rank would call where the other no longer is."""
    for delay_s in (0.0, 0.1):
        time.sleep(delay_s * dist.get_rank())
        # On CPUs only such groups have the names of those that are split off.
        group = dist.new_group([0, 1], use_local_synchronization=True)
        total = torch.ones(1)
        dist.all_reduce(total, group=group)
        assert total == 2
        del group
        release_groups()


def error_after_a_rank_has_died(comm: Communicator) -> str:
    if comm.rank == 1:
        os._exit(0)
    try:
        comm.all_gather(torch.ones(1 << 16), 0)
    except CollectiveError as error:
        return str(error)
    return "no error"


def main() -> None:
    join_ranks(timedelta(seconds=30))
    comm = Communicator(dist.group.WORLD, "tp")
    for shape, dim in [((1, 3, 4), 1), ((2, 3, 4), 1), ((2, 3, 4), 0), ((3, 4), 0), ((3, 4), 1)]:
        check_gather_and_scatter(comm, shape, dim)
    check_a_single_row_is_gathered_without_a_copy(comm)
    check_all_reduce(comm)
    check_all_to_all(comm)
    check_groups_after_others_have_gone()
    results = counted(dist.group.WORLD)
    results["error"] = error_after_a_rank_has_died(comm)
    torch.save(results, Path(sys.argv[1]) / "results.pt")
    # The group of a dead rank cannot be taken down.
    os._exit(0)


if __name__ == "__main__":
    main()
