"""Lose or stop one of 4 ranks in several ways; run by test_lost_rank.py.

Arguments: the folder for results. Each case runs in a fork of its own, in which a rank writes what
it is told to CASE/rank-N.txt, its output to CASE/rank-N.log and its exit code to CASE/rank-N.code.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from launch.local import free_port
from parallel.comm import Communicator
from parallel.lost_rank import RankMonitor
from parallel.mesh import join_ranks, limit_collectives

RANK = int(os.environ["RANK"])
# A busy machine may take as long as that to run a rank that is well.
TIMEOUT_S = 20
# Until the lost rank is killed, with whatever it does.
VERY_LONG_S = 10**4
LOST = 3
SLOW = 2
EXIT_CODE = 70
NEVER = 10**6


class Double(torch.autograd.Function):
    """Sums the gradient over `tp`."""

    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        return x.clone()

    @staticmethod
    def backward(ctx, *grad):
        return ctx.tp.all_reduce(grad[0].contiguous()), None


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_data() -> None:
    time.sleep(VERY_LONG_S)


def loop_forever() -> None:
    # What is done in the background may wait for others, and is not what they wait for.
    threading.Thread(target=dist.barrier, daemon=True).start()
    while True:
        pass


def block_interpreter() -> None:
    # A PyDLL keeps the interpreter's lock while it calls.
    ctypes.PyDLL(None).sleep(VERY_LONG_S)


def call_another_collective() -> None:
    dist.barrier()


def fail() -> None:
    raise ValueError("no such shard")


@dataclass
class Case:
    """A rank that is lost before step 3; `lost` None means all.

    Attributes:
        hangs: whether only the watchdog can notice, because collectives wait for very long.
    """

    lose: Callable[[], None]
    lost: int | None = LOST
    hangs: bool = False

    @property
    def does_not_end(self) -> bool:
        """Whether the lost rank has to be killed."""
        return self.lose in (stop, block_interpreter)


CASES = {
    "killed": Case(kill),
    "stopped": Case(stop),
    "stuck": Case(wait_for_data),
    "failed": Case(fail),
    "astray": Case(call_another_collective),
    "killed-store": Case(kill, 0),
    "stopped-store": Case(stop, 0),
    "hang-stopped": Case(stop, hangs=True),
    "hang-stopped-store": Case(stop, 0, hangs=True),
    "hang-loop": Case(loop_forever, hangs=True),
    "hang-native": Case(block_interpreter, hangs=True),
    "hang-astray": Case(call_another_collective, hangs=True),
    "hang-all": Case(wait_for_data, None, hangs=True),
}


def write(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


def monitor_in(folder: Path, hang_timeout_s: float) -> RankMonitor:
    def end(message: str) -> None:
        write(folder / f"rank-{RANK}.txt", message)
        os._exit(EXIT_CODE)

    monitor = RankMonitor(end, hang_timeout_s, heartbeat_s=0.3)
    monitor.folder = folder
    return monitor


def train(case: Case, folder: Path) -> None:
    """Steps until rank `lost` is."""
    join_ranks(timedelta(minutes=1))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    tp = Communicator(mesh["tp"].get_group(), "tp")
    with monitor_in(folder, TIMEOUT_S if case.hangs else NEVER) as monitor:
        for step in range(1, 1000):
            monitor.beat(step, "train")
            if step == 3:
                # Not before all are there: the first steps are slow on a busy machine.
                if not case.hangs:
                    limit_collectives(timedelta(seconds=TIMEOUT_S))
                if case.lost in (RANK, None):
                    case.lose()
            x = torch.ones(8, requires_grad=True)
            Double.apply(x, tp).sum().backward()
            dist.all_reduce(x.grad, group=mesh["fsdp"].get_group())
            dist.barrier()


def train_slowly(folder: Path) -> None:
    """Steps in which all wait longer than the timeout for one rank, first where nobody knows how
    long a step takes, and then where it has taken as long before.
    """
    join_ranks(timedelta(minutes=1))
    with monitor_in(folder, TIMEOUT_S) as monitor:
        for step in (1, 2):
            monitor.beat(step, "train")
            if RANK == LOST:
                time.sleep(1.2 * TIMEOUT_S)
            dist.barrier()
    write(folder / f"rank-{RANK}.txt", "finished")


def train_beside_a_straggler(folder: Path) -> None:
    """Steps until rank 0 has seen who is slow often enough to warn."""
    join_ranks(timedelta(minutes=1))
    with monitor_in(folder, NEVER) as monitor:
        for step in range(1, 200):
            monitor.beat(step, "train")
            if RANK == SLOW:
                time.sleep(0.5)
            slowest = monitor.slowest
            has_warned = torch.tensor(slowest is not None and slowest.is_persistent)
            dist.broadcast(has_warned, src=0)
            if has_warned:
                break
        if RANK == 0:
            write(folder / "slowest.txt", f"{slowest.rank} {slowest.over_median}")


def run(folder: Path, act: Callable[[], None]) -> None:
    log = os.open(folder / f"rank-{RANK}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        act()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    finally:
        # The groups of a lost rank cannot be taken down.
        os._exit(0)


def wait_for_survivors(folder: Path) -> None:
    """Until the other ranks have written what they were told."""
    while len(list(folder.glob("rank-?.txt"))) < 3:
        time.sleep(0.05)


def port_of(folder: Path) -> str:
    """One that rank 0 has chosen."""
    if RANK == 0:
        write(folder / "port", str(free_port()))
    while not (folder / "port").exists():
        time.sleep(0.05)
    return (folder / "port").read_text()


def fork(folder: Path, act: Callable[[], None]) -> int:
    folder.mkdir(exist_ok=True)
    os.environ["MASTER_PORT"] = port_of(folder)
    if child := os.fork():
        return child
    run(folder, act)
    raise AssertionError


def finish(folder: Path, child: int) -> None:
    _, status = os.waitpid(child, 0)
    write(folder / f"rank-{RANK}.code", str(os.waitstatus_to_exitcode(status)))


def main() -> None:
    folder = Path(sys.argv[1])
    # All at once: they mostly wait.
    children = {
        name: fork(folder / name, lambda case=case, name=name: train(case, folder / name))
        for name, case in CASES.items()
    }
    children["slow"] = fork(folder / "slow", lambda: train_slowly(folder / "slow"))
    for name, child in children.items():
        case = CASES.get(name)
        if case and case.lost == RANK and case.does_not_end:
            wait_for_survivors(folder / name)
            os.kill(child, signal.SIGKILL)
        finish(folder / name, child)
    # Others must not slow its ranks.
    straggler = folder / "straggler"
    finish(straggler, fork(straggler, lambda: train_beside_a_straggler(straggler)))


if __name__ == "__main__":
    main()
