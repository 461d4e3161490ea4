"""Measure the memory of real steps: `python -m pretrain.dry_run.measure CONFIG` on each rank.

Tokens are random, rows are one document each. Rank 0 prints a JSON list, of each rank.

Args:
    CONFIG: a resolved configuration, YAML.
"""

import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from parallel.fsdp import owned_region
from parallel.mesh import join_ranks
from pretrain.answer import answer
from pretrain.build import build_mesh, build_model, open_store
from pretrain.config import Config, parse_config
from pretrain.dry_run.plan import axis_names
from pretrain.dry_run.step import Step
from pretrain.dry_run.tracker import WEIGHTS, StepTracker
from pretrain.layouts import resolve_layout
from pretrain.model.init import initialize

# In the first, what lasts is made. Of the others the least counts: gloo's threads may still hold
# what they have sent.
STEPS = 4


@dataclass(frozen=True)
class MeasuredMemory:
    """Bytes of a rank in a step.

    Attributes:
        device: `cpu` or `cuda`.
        peak, parts, kept, activations: see `plan.Memory`.
        before: of the process before there was a model; on a GPU 0.
        process: the most of the process; on a GPU of its allocator, with what is cached.
        offloaded: the most that waited elsewhere.
    """

    device: str
    peak: int
    parts: dict[str, int]
    kept: dict[str, int]
    activations: int
    before: int
    process: int
    offloaded: int


def measure(config: Config, device: torch.device) -> MeasuredMemory:
    """Train on this rank. Collective."""
    before = _resident("VmRSS") if device.type == "cpu" else 0
    layout = resolve_layout(config, dist.get_world_size())
    mesh = build_mesh(config, layout, device)
    store = open_store(config)
    parallelised = build_model(config, layout, mesh, device, store=store)
    with StepTracker(axis_names(mesh)) as tracker:
        tracker.part = WEIGHTS
        for stage in parallelised.stages:
            stage.to_empty(device=device)
            initialize(stage.model, config.model, config.train.seed, owned_region)
        step = Step(config, layout, mesh, parallelised, tracker, device)
        step.warm_up()
        measured: list[MeasuredMemory] = []
        for _ in range(STEPS):
            tracker.reset()
            _forget_peak(device)
            step.backward(step.microbatches)
            step.update()
            of_step = MeasuredMemory(
                device.type,
                tracker.peak,
                dict(tracker.parts_at_peak),
                dict(step.kept),
                step.activations_at_peak(step.microbatches),
                before,
                _peak_of_process(device),
                store.most if store else 0,
            )
            measured.append(of_step)
    least = min(measured[1:], key=lambda of_step: of_step.peak)
    kept = {layer: min(of_step.kept[layer] for of_step in measured[1:]) for layer in least.kept}
    activations = min(of_step.activations for of_step in measured[1:])
    return replace(least, kept=kept, activations=activations)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Of VmHWM, see proc(5).
        Path("/proc/self/clear_refs").write_text("5")


def _peak_of_process(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return _resident("VmHWM")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(value) * 1024


def main() -> list[MeasuredMemory]:
    config = parse_config(yaml.safe_load(Path(sys.argv[1]).read_text()))
    device = join_ranks(timedelta(seconds=config.train.collective_timeout_s))
    measured: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(measured, measure(config, device))
    return measured


if __name__ == "__main__":
    answer(main)
