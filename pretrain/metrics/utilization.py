"""How much of what the devices can do a step has used: MFU and HFU.

Model FLOPs utilization: Chowdhery et al. 2022, arXiv:2204.02311, appendix B; hardware FLOPs
utilization counts what is computed again as well.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from data_pipeline.stream import BatchPlan
from pretrain.config import Config
from pretrain.metrics.flops import Extent, extent_of, head, mixer, mixture, router
from pretrain.metrics.peaks import peak_of
from pretrain.parts import recompute_modes


class StepFlops(NamedTuple):
    """Operations of a step over all ranks: what the model needs, and what is computed."""

    model: float
    hardware: float


def utilization(
    config: Config,
    plan: BatchPlan,
    dropped_slots: float,
    seconds: float,
    devices: int,
    peak: float | None,
) -> dict[str, Any]:
    """The perf/* metrics of operations.

    Args:
        plan: what the global batch was filled with.
        dropped_slots: of all its tokens and layers.
        peak: operations per second of a device; None if it is not known.
    """
    flops = step_flops(config, extent_of_batch(config, plan), dropped_slots)
    device_seconds = seconds * devices
    metrics = {"perf/tflops_per_device": flops.model / device_seconds / 1e12}
    if peak is not None:
        metrics["perf/mfu"] = flops.model / device_seconds / peak
        metrics["perf/hfu"] = flops.hardware / device_seconds / peak
    return metrics


def peak_of_device(config: Config, device: torch.device) -> float | None:
    """Operations per second; None on a device that neither we nor the configuration know."""
    if config.train.peak_tflops is not None:
        return config.train.peak_tflops * 1e12
    return peak_of(device, getattr(torch, config.train.dtype))


def extent_of_batch(config: Config, plan: BatchPlan) -> Extent:
    """Of the documents of a global batch, as they lie in its rows."""
    start, lengths = plan.pieces[:, 2], plan.pieces[:, 3] - plan.pieces[:, 2]
    if not config.context.carry:
        segment = config.data.seq_len // config.context.segments
        ends = np.cumsum(lengths)
        ends = np.union1d(ends, np.arange(segment, ends[-1], segment))
        return extent_of(config.model, np.diff(ends, prepend=0))
    earlier = np.zeros_like(start)
    if plan.continues is not None:
        first = plan.row_starts[:-1][plan.continues]
        earlier[first] = start[first]
    return extent_of(config.model, lengths, earlier)


def step_flops(config: Config, extent: Extent, dropped_slots: float = 0) -> StepFlops:
    """Of a global batch; of the kernels of ours, which keep what they do not compute again."""
    model, modes = config.model, recompute_modes(config)
    is_tiled = config.parallel.feed_forward_tile is not None
    groups = -(-config.context.segments // config.context.reach)
    # All segments of a group but the last one go forward without a gradient first.
    share_twice = 1 - groups / config.context.segments
    dropped_in_each = dropped_slots / model.n_layers

    of_router = router(model, extent.tokens)
    of_mixture = mixture(model, extent.tokens, dropped_in_each)
    of_head = head(model, extent.tokens)
    needed = of_head.forward + of_head.backward
    again = 0.0
    for number, kind in enumerate(model.layer_kinds()):
        of_mixer = mixer(model, kind, extent)
        layer = of_mixer + of_router + of_mixture
        needed += layer.forward + layer.backward
        again += layer.repeated + share_twice * layer.forward
        is_full = modes[number % len(modes)] == "full"
        if is_full:
            again += of_mixer.forward + of_router.forward
        if is_full or is_tiled:
            # A second pass ends with what is saved last: the input of a dense layer's last product.
            again += of_mixture.forward * (1 if model.moe.n_experts else 2 / 3)
    return StepFlops(needed, needed + again)
