"""`farspan train --dry-run`: print what a rank of a layout would hold, need and send."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from launch.sizes import size_text
from pretrain.config import Config, load_config, phases_of
from pretrain.curriculum import Phase
from pretrain.engines.choice import check_is_native
from pretrain.layouts import resolve_layouts

if TYPE_CHECKING:
    from pretrain.dry_run.plan import Plan


def print_plan(recipe: str, overrides: Sequence[str], ranks: int, rank: int) -> None:
    """Plan each phase of a recipe for `rank` of `ranks` and print the plans."""
    config = load_config(recipe, overrides)
    phases = phases_of(config)
    for phase in phases:
        check_is_native(phase.config, "--dry-run")
    resolve_layouts(config, ranks)
    from pretrain.dry_run.assumptions import ASSUMPTIONS

    console = Console(highlight=False, soft_wrap=True)
    for phase, plan in zip(phases, _plan(phases, ranks, rank), strict=True):
        console.print(f"{recipe} on {ranks} ranks ({plan.layout})")
        if len(phases) > 1:
            console.print(str(phase))
        _print_plan(console, plan, phase.config)
    for assumption in ASSUMPTIONS:
        console.print(f"assumed: {assumption}")
    if plan.layout.pp > 1:
        firsts = ", ".join(str(first) for first in range(0, ranks, ranks // plan.layout.pp))
        console.print(f"ranks differ by their place in the pipeline: see --rank {firsts}")


def _plan(phases: Sequence[Phase], ranks: int, rank: int) -> Iterator["Plan"]:
    """Each in a process of its own: torch keeps meshes of an earlier plan."""
    from pretrain.dry_run.plan import plan_rank

    plan = partial(plan_rank, ranks=ranks, rank=rank)
    configs = [phase.config for phase in phases]
    if len(phases) == 1:
        yield plan(configs[0])
        return
    processes = min(len(phases), os.cpu_count() or 1)
    context = get_context("forkserver")
    context.set_forkserver_preload(["pretrain.dry_run.plan"])
    with ProcessPoolExecutor(processes, context, max_tasks_per_child=1) as pool:
        yield from pool.map(plan, configs)


def _print_plan(console: Console, plan: "Plan", config: Config) -> None:
    rank, place = plan.rank, ", ".join(f"{axis} {at}" for axis, at in plan.coordinates.items())
    console.print(f"rank {rank} ({place}): {_layers(plan.layers)}")
    console.print(
        f"{plan.microbatches} microbatches of {config.train.microbatch} x {config.data.seq_len:,} "
        "tokens a step\n"
    )

    memory = plan.memory
    table = Table(box=None, pad_edge=False)
    table.add_column("memory", min_width=20)
    table.add_column("", justify="right", min_width=12)
    table.add_column("", no_wrap=True)
    for name, size, remark in (
        ("weights", memory.weights, f"{plan.parameters:,} parameters, float32"),
        ("gradients", memory.gradients, ""),
        ("optimizer state", memory.optimizer, ""),
        ("gathered weights", memory.gathered, "at the peak"),
        ("activations", memory.activations, "kept for the backward pass, at most"),
        ("peak", memory.peak, "at a time, with temporaries"),
    ):
        table.add_row(name, size_text(size), remark)
    console.print(table)
    console.print()

    table = Table(box=None, pad_edge=False)
    table.add_column("axis", min_width=14)
    table.add_column("collectives of a step", min_width=22)
    table.add_column("calls", justify="right")
    table.add_column("sent", justify="right", min_width=12)
    for (axis, kind), traffic in plan.traffic.items():
        table.add_row(axis, kind, f"{traffic.calls:,}", size_text(traffic.bytes))
    console.print(table)
    console.print()


def _layers(numbers: Sequence[int]) -> str:
    """Consecutive numbers as ranges: layers 0-3, 12-15."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    ranges = [f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True)]
    return f"layers {', '.join(ranges)}" if ranges else "no layer"
