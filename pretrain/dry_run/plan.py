"""What one rank of a layout holds, needs and sends, found by training on fake tensors."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.fsdp import local_tensor
from parallel.mesh import Mesh
from pretrain.build import build_mesh, build_model
from pretrain.config import Config
from pretrain.dry_run.assumptions import (
    Elsewhere,
    drop_nothing,
    fake_tensors,
    update_as_gpus_do,
    with_all_to_all,
)
from pretrain.dry_run.step import Step
from pretrain.dry_run.tracker import OTHER, WEIGHTS, StepTracker, Traffic
from pretrain.errors import UserError
from pretrain.layouts import Layout, resolve_layout

# Of a pipeline or of segments, where fewer were planned.
MORE_MICROBATCHES = "more microbatches"
MORE_SEGMENTS = "more segments"


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        weights, optimizer: what lasts from step to step.
        gradients: what is there when a step is updated.
        activations: the most that is kept for backward passes at a time.
        gathered: whole weights that FSDP has gathered when memory is at its peak.
        peak: the most that is alive at a time.
        parts: of that, what it is for.
        kept: layer -> what its forward pass leaves for its backward pass.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    gathered: int
    peak: int
    parts: Mapping[str, int]
    kept: Mapping[str, int]


@dataclass(frozen=True)
class Plan:
    """What one rank holds, needs and sends.

    Attributes:
        rank: of `layout.world_size`.
        coordinates: the rank's place on each axis.
        layers: numbers of the layers on this rank.
        parameters: of them, how many this rank stores.
        microbatches: of this rank, in a step.
        traffic: (axis, kind) -> collectives of a step.
    """

    layout: Layout
    rank: int
    coordinates: Mapping[str, int]
    layers: tuple[int, ...]
    parameters: int
    microbatches: int
    memory: Memory
    traffic: Mapping[tuple[str, str], Traffic]


def plan_rank(config: Config, ranks: int, rank: int, *, on_gpus: bool = True) -> Plan:
    """Plan rank `rank` of `ranks`, in this process and without memory for any tensor.

    Args:
        on_gpus: with the kernels of GPUs, else those of CPUs; host memory is not the device's then.

    Raises:
        UserError: there is no such rank, or the layout does not work.
    """
    layout = resolve_layout(config, ranks)
    if rank >= ranks:
        raise UserError(f"--rank {rank}: the {ranks} ranks are numbered from 0 to {ranks - 1}")
    config = with_all_to_all(config)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        device = torch.device("cpu")
        mesh = build_mesh(config, layout, device)
        elsewhere = ("host", "disk") if on_gpus else ("disk",)
        store = Elsewhere() if config.parallel.offload in elsewhere else None
        parallelised = build_model(config, layout, mesh, device, store=store)
        drop_nothing(parallelised)
        with fake_tensors(config, layout, on_gpus), StepTracker(axis_names(mesh)) as tracker:
            tracker.part = WEIGHTS
            for stage in parallelised.stages:
                stage.to_empty(device=device)
            step = Step(config, layout, mesh, parallelised, tracker)
            if on_gpus:
                update_as_gpus_do(step.optimizer)
            return _plan(step)
    finally:
        dist.destroy_process_group()


def axis_names(mesh: Mesh) -> dict[str, str]:
    """Process group name -> axis, of the groups that this rank is in."""
    # Axes over the same ranks may share a group, which then goes by its name in `weights`.
    arrangements: list[DeviceMesh] = [mesh.tokens, mesh.experts, mesh.weights]
    if mesh.sequence is not None:
        arrangements.insert(0, mesh.sequence)
    return {
        arrangement.get_group(axis).group_name: axis
        for arrangement in arrangements
        for axis in arrangement.mesh_dim_names or ()
    }


def _plan(step: Step) -> Plan:
    """Run a step of few microbatches and one of more; further ones add what these added. The same
    with segments, each of which is handed something by all earlier ones.
    """
    tracker, microbatches, segments = step.tracker, step.microbatches, step.segments
    weights = list(step.parallelised.weights.parameters())
    step.warm_up()
    traffic, buffers, telling_segments = {}, {}, step.telling_segments()
    for n in step.telling_microbatches():
        seen: dict[int, Seen] = {}
        for of_segments in telling_segments:
            step.take_segments(of_segments)
            tracker.reset()
            before = tracker.live
            step.backward(n)
            gradients = _stored(weight.grad for weight in weights if weight.grad is not None)
            # A pipeline has a buffer for each microbatch that it receives.
            buffers[n] = tracker.live - before - gradients
            at_backward = tracker.peak
            step.update()
            seen[of_segments] = Seen(at_backward, tracker.peak, tracker.traffic)
        traffic[n] = _traffic_of(seen, segments)

    activations = step.activations_at_peak(microbatches)
    parts = Counter(tracker.parts_at_peak)
    step.take_segments(segments)
    peak = _peak_of(seen, segments)
    if peak > tracker.peak:
        parts[MORE_SEGMENTS] += peak - tracker.peak
    if step.layout.pp > 1:
        further = activations - step.activations_at_peak(n)
        further += _on_line(buffers, microbatches) - buffers[n]
        parts[MORE_MICROBATCHES] += further
    else:
        further = (microbatches - n) * step.bytes_of_tokens
        parts[OTHER] += further
    mesh = step.mesh.tokens
    return Plan(
        layout=step.layout,
        rank=dist.get_rank(),
        coordinates={axis: mesh.get_local_rank(axis) for axis in mesh.mesh_dim_names or ()},
        layers=step.layers,
        parameters=sum(local_tensor(weight).numel() for weight in weights),
        microbatches=microbatches,
        memory=Memory(
            weights=_stored(weights),
            optimizer=_stored(x for state in step.optimizer.state.values() for x in state.values()),
            gradients=gradients,
            activations=activations,
            gathered=tracker.gathered_at_peak,
            peak=peak + further,
            parts=parts,
            kept=step.kept,
        ),
        traffic=_extended(traffic, microbatches),
    )


class Seen(NamedTuple):
    """Of a step: the peak of its forward and backward passes, that of all, and collectives."""

    at_backward: int
    peak: int
    traffic: Mapping[tuple[str, str], Traffic]


def _peak_of(seen: Mapping[int, Seen], segments: int) -> int:
    """With each segment the passes need as much more, the update does not."""
    longest = dict(sorted(seen.items())[-2:])
    at_backward = _on_line({n: found.at_backward for n, found in longest.items()}, segments)
    return max(at_backward, seen[max(seen)].peak)


def _traffic_of(seen: Mapping[int, Seen], segments: int) -> Mapping[tuple[str, str], Traffic]:
    """A segment's keys meet those of all earlier ones, so collectives lie on a parabola."""
    if segments in seen:
        return seen[segments].traffic
    first, second, _ = sorted(seen)
    at = (segments - first) // (second - first)
    result = {}
    for key in {key for found in seen.values() for key in found.traffic}:
        three = [seen[n].traffic.get(key, Traffic()) for n in sorted(seen)]
        calls, sent = (
            _on_parabola(values, at)
            for values in ([x.calls for x in three], [x.bytes for x in three])
        )
        result[key] = Traffic(calls, sent)
    return result


def _on_parabola(values: Sequence[int], at: int) -> int:
    """The value at `at` of the parabola through those at 0, 1 and 2 (Newton's form)."""
    first, second, third = values
    step, bend = second - first, third - 2 * second + first
    return first + at * step + at * (at - 1) // 2 * bend


def _stored(tensors: Iterable[Tensor]) -> int:
    """Bytes of what this rank has of them."""
    return sum(local_tensor(tensor).nbytes for tensor in tensors)


def _extended(
    measured: Mapping[int, Mapping[tuple[str, str], Traffic]], microbatches: int
) -> dict[tuple[str, str], Traffic]:
    """The traffic of a step, from that of fewer microbatches."""
    keys = sorted({key for traffic in measured.values() for key in traffic})
    result = {}
    for key in keys:
        of_n = {n: traffic.get(key, Traffic()) for n, traffic in measured.items()}
        result[key] = Traffic(
            _on_line({n: traffic.calls for n, traffic in of_n.items()}, microbatches),
            _on_line({n: traffic.bytes for n, traffic in of_n.items()}, microbatches),
        )
    return result


def _on_line(measured: Mapping[int, int], n: int) -> int:
    """The value at `n` of the straight line through one or two points."""
    (n_0, value_0), (n_1, value_1) = min(measured.items()), max(measured.items())
    return round(value_1 + (n - n_1) * (value_1 - value_0) / max(1, n_1 - n_0))
