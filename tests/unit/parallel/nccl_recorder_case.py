"""What the flight recorder says of a collective of NCCL, of one rank; run by
test_flight_recorder.py.
"""

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.flight_recorder import CollectiveTime, oldest_pending
from parallel.mesh import join_ranks

A_WHILE = 2_000_000_000


def main() -> None:
    device = join_ranks(timedelta(minutes=1))
    timed = CollectiveTime()
    x = torch.ones(1 << 20, device=device)
    dist.all_reduce(x)
    torch.cuda.synchronize()
    assert oldest_pending() is None
    torch.cuda._sleep(A_WHILE)
    dist.all_reduce(x)
    pending = oldest_pending()
    assert pending is not None
    assert (pending.name.partition(" ")[0], pending.ranks) == ("all_reduce", (0,)), pending
    assert not pending.has_begun
    torch.cuda.synchronize()
    assert oldest_pending() is None
    # NCCL's watchdog looks for what has completed ten times a second.
    while timed.total_s() == 0:
        time.sleep(0.05)


if __name__ == "__main__":
    main()
