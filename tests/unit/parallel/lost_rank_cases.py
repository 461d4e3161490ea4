"""Lose one of 4 ranks in several ways; run by test_lost_rank.py.

Arguments: the folder for results. Each case runs in a fork of its own, which writes its error to
CASE-RANK.txt.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from launch.local import free_port
from parallel.comm import Communicator
from parallel.lost_rank import LostRankError, RankMonitor
from parallel.mesh import join_ranks, limit_collectives

RANK = int(os.environ["RANK"])
TIMEOUT = timedelta(seconds=4)
LOST = 3


class Double(torch.autograd.Function):
    """Sums the gradient over `tp`."""

    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        return x.clone()

    @staticmethod
    def backward(ctx, *grad):
        return ctx.tp.all_reduce(grad[0].contiguous()), None


def train(lose: Callable[[], None], lost: int) -> None:
    """Steps in which rank `lost` is lost before the third."""
    join_ranks(timedelta(minutes=1))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    tp = Communicator(mesh["tp"].get_group(), "tp")
    with RankMonitor() as monitor:
        for monitor.step in range(1, 1000):
            if monitor.step == 3:
                # Not before all are there: the first steps are slow on a busy machine.
                limit_collectives(TIMEOUT)
                if lost == RANK:
                    lose()
            x = torch.ones(8, requires_grad=True)
            Double.apply(x, tp).sum().backward()
            dist.all_reduce(x.grad, group=mesh["fsdp"].get_group())
            dist.barrier()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def wait_for_data() -> None:
    time.sleep(60)


def call_another_collective() -> None:
    dist.barrier()


def fail() -> None:
    raise ValueError("no such shard")


CASES = {
    "killed": (kill, LOST),
    "stopped": (stop, LOST),
    "stuck": (wait_for_data, LOST),
    "failed": (fail, LOST),
    "astray": (call_another_collective, LOST),
    "killed-store": (kill, 0),
    "stopped-store": (stop, 0),
}


def run_case(name: str, folder: Path) -> None:
    try:
        train(*CASES[name])
    except LostRankError as error:
        temporary = folder / f".{name}-{RANK}.txt"
        temporary.write_text(str(error))
        temporary.rename(folder / f"{name}-{RANK}.txt")
    finally:
        # The groups of a lost rank cannot be taken down.
        os._exit(0)


def wait_for_survivors(name: str, folder: Path) -> None:
    """Until the other ranks have written their error."""
    while len(list(folder.glob(f"{name}-*.txt"))) < 3:
        time.sleep(0.05)


def port_of(name: str, folder: Path) -> str:
    """One that rank 0 has chosen."""
    file = folder / f"{name}.port"
    if RANK == 0:
        (folder / f".{name}.port").write_text(str(free_port()))
        (folder / f".{name}.port").rename(file)
    while not file.exists():
        time.sleep(0.05)
    return file.read_text()


def fork(name: str, folder: Path) -> int:
    os.environ["MASTER_PORT"] = port_of(name, folder)
    if child := os.fork():
        return child
    run_case(name, folder)
    raise AssertionError


def main() -> None:
    folder = Path(sys.argv[1])
    # All at once: they mostly wait.
    children = {name: fork(name, folder) for name in CASES}
    for name, child in children.items():
        lose, lost = CASES[name]
        if lost == RANK and lose in (stop, wait_for_data):
            wait_for_survivors(name, folder)
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
