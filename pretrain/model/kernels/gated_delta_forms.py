"""How a segment of the gated delta rule is computed on which device."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.model.kernels import gated_delta_chunks as chunks
from pretrain.model.kernels import gated_delta_transfers as transfers
from pretrain.model.kernels.compiled import compiled

# Tokens of a segment. On a CPU one segment's tensors stay in the cache.
CPU_SEGMENT = 512
# On a GPU it is as long as memory should allow: heads x tokens of 2 GB or so at D = E = 128.
GPU_SEGMENT_HEADS = 1 << 17


class Form(NamedTuple):
    """The functions of `gated_delta_chunks`, or others that compute the same."""

    prepare: Callable[..., chunks.Prepared]
    scan_states: Callable[..., tuple[Tensor, Tensor]]
    outputs: Callable[..., Tensor]
    scan_state_gradients: Callable[..., tuple[Tensor, Tensor]]
    segment_gradients: Callable[..., chunks.Gradients]


BY_CHUNK = Form(
    chunks.prepare,
    chunks.scan_states,
    chunks.outputs,
    chunks.scan_state_gradients,
    chunks.segment_gradients,
)
BY_TRANSFER = BY_CHUNK._replace(
    scan_states=transfers.scan_states, scan_state_gradients=transfers.scan_state_gradients
)


def form_on(device: torch.device) -> Form:
    return BY_CHUNK if device.type == "cpu" else _compiled_form()


def segment_tokens(v: Tensor) -> int:
    """How many tokens of v [B, Hv, T, E] are computed at a time, a multiple of the chunk."""
    if v.device.type == "cpu":
        return CPU_SEGMENT
    heads = v.shape[0] * v.shape[1]
    return max(CPU_SEGMENT, GPU_SEGMENT_HEADS // heads // CPU_SEGMENT * CPU_SEGMENT)


@cache
def _compiled_form() -> Form:
    """The scans stay as they are: their steps are single products."""
    return BY_TRANSFER._replace(
        prepare=compiled(BY_TRANSFER.prepare),
        outputs=compiled(BY_TRANSFER.outputs),
        segment_gradients=compiled(BY_TRANSFER.segment_gradients),
    )
