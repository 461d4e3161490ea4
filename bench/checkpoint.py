"""How long training waits for a checkpoint.

    python -m bench.checkpoint [--megabytes 1200] [--ranks 2] [--target FOLDER]

Every rank has its part of the weights and of AdamW's moments, `--megabytes` in all. Medians of
three: seconds that training waits for a synchronous save, and for one in the background (the copy,
and the commit once all files are written; the ranks go on computing meanwhile), both of farspan
and of torch's own distributed checkpointing (`dcp.save`, `dcp.async_save` with its defaults), which
hashes nothing. Then a load, which verifies every byte before. Exit code 1: the background save
makes training wait longer than 10 % of the synchronous one.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from bench.ranks import run_on_ranks
from parallel.mesh import join_ranks
from pretrain.checkpoint.contents import of_optimizer, of_weights
from pretrain.checkpoint.store import CheckpointStore, Progress, Retention
from pretrain.checkpoint.target import Target
from pretrain.config import OptimConfig
from pretrain.optim import build_optimizer, moments

TIMES = 3
ALLOWED = 0.1
MATRICES = 8


class State:
    """Weights and moments, sharded over the ranks."""

    def __init__(self, megabytes: int) -> None:
        ranks = dist.get_world_size()
        mesh = init_device_mesh("cpu", (ranks,))
        elements = megabytes * 2**20 * ranks // (3 * 4 * MATRICES)
        shape = elements // 1024 // ranks * ranks, 1024
        self.weights = nn.ParameterDict(
            {
                str(i): nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(0)]))
                for i in range(MATRICES)
            }
        )
        self.optimizer = build_optimizer(self.weights, OptimConfig())
        for weight in self.weights.values():
            moments(self.optimizer, weight)

    def tensors(self) -> dict:
        return of_weights(self.weights) | of_optimizer(self.weights, self.optimizer)

    def tree(self) -> dict:
        return {
            name: {"weight": weight.detach(), **moments(self.optimizer, weight)}
            for name, weight in self.weights.items()
        }

    def bytes_per_rank(self) -> int:
        return 3 * sum(weight.to_local().nbytes for weight in self.weights.values())


def compute_until(is_done: Callable[[], bool]) -> None:
    """Steps go on until all ranks have written."""
    a, everywhere = torch.randn(512, 512), torch.zeros(1)
    while int(everywhere) < dist.get_world_size():
        for _ in range(20):
            a @ a
        everywhere = torch.tensor([float(is_done())])
        dist.all_reduce(everywhere)


def seconds(work: Callable[[], object]) -> float:
    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - began


def ours(state: State, folder: Path) -> tuple[float, float, float]:
    store = CheckpointStore(Target(str(folder)), Retention(1), 1, lambda: None)
    store.go_on_from(0)
    steps = iter(range(1, 100))

    def start() -> None:
        store.start_save(Progress(next(steps), 0, {}), state.tensors())

    def whole() -> None:
        start()
        store.finish_save()

    whole()
    synchronous = median(seconds(whole) for _ in range(TIMES))
    waits = []
    for _ in range(TIMES):
        copied = seconds(start)
        compute_until(lambda: store.is_written)
        waits.append(copied + seconds(store.finish_save))
    load = seconds(lambda: store.load(lambda index: state.tensors()))
    return synchronous, median(waits), load


def of_torch(state: State, folder: Path) -> tuple[float, float]:
    group = dist.new_group(backend="gloo")

    def save() -> None:
        dcp.save(state.tree(), checkpoint_id=folder / "torch")

    save()
    synchronous = median(seconds(save) for _ in range(TIMES))
    waits = []
    for _ in range(TIMES):
        futures = []

        def start(futures: list = futures) -> None:
            path = folder / "torch"
            futures.append(dcp.async_save(state.tree(), checkpoint_id=path, process_group=group))

        waits.append(seconds(start))
        compute_until(futures[0].done)
    return synchronous, median(waits)


def measure(megabytes: int, folder: Path) -> bool:
    state = State(megabytes)
    synchronous, background, load = ours(state, folder)
    theirs = of_torch(state, folder)
    if dist.get_rank() == 0:
        size = state.bytes_per_rank() / 1e9
        print(f"{dist.get_world_size()} ranks of {size:.2f} GB; {folder}")
        print("\n| | synchronous, s | background: training waits, s | share |")
        print("|---|---:|---:|---:|")
        for name, whole, wait in (("farspan", synchronous, background), ("torch", *theirs)):
            print(f"| {name} | {whole:.2f} | {wait:.2f} | {wait / whole:.1%} |")
        print(f"\nverified and loaded in {load:.2f} s")
    return background <= ALLOWED * synchronous


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=1200, help="of each rank")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--target", type=Path, default=None, help="[default: a temporary folder]")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        join_ranks(timedelta(minutes=10))
        is_fast = measure(options.megabytes, options.target)
        dist.destroy_process_group()
        return int(not is_fast)
    folder = Path(tempfile.mkdtemp(dir=options.target))
    try:
        arguments = ("--as-rank", "--megabytes", str(options.megabytes), "--target", str(folder))
        return run_on_ranks(options.ranks, "bench.checkpoint", *arguments)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
