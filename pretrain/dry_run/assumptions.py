"""What a dry run takes for granted where a step asks its data, another rank, or a long loop."""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed.pipelining.stage
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining import schedules
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.apply import Parallelised
from parallel.expert.dispatch import AllToAllDispatch, Route
from parallel.offload import Handle, Store
from pretrain.config import Config
from pretrain.layouts import Layout
from pretrain.model import norm
from pretrain.model.kernels import experts, short_convolution
from pretrain.model.kernels.experts_grouped import grouped_mixture
from pretrain.model.kernels.rms_norm import fused_rms_norm
from pretrain.model.moe import MoE, dispatch_locally

ASSUMPTIONS = (
    "every row is one document; tokens choose their experts at random, evenly; all-to-all carries "
    "them",
    "the kernels of GPUs, with flash attention; what they need inside, and what an allocator and "
    "NCCL keep, comes on top",
)


@contextmanager
def fake_tensors(config: Config, layout: Layout, on_gpus: bool = True) -> Iterator[None]:
    """Run models on tensors that have a shape, a type and a device, and no memory.

    A model that was built on the meta device can be moved here.
    """
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_GroupedProducts())
        if on_gpus:
            stack.enter_context(gpu_kernels())
        for owner, name, stand_in in (
            (AllToAllDispatch, "route", _even_routes(config, layout)),
            # All blocks of its loop need the same memory.
            (short_convolution, "_blocks", _first_and_last(short_convolution._blocks)),
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        if hasattr(schedules._PipelineSchedule, "_warmup_p2p"):
            agreed = patch.object(schedules._PipelineSchedule, "_warmup_p2p", _agree_on_shapes)
            stack.enter_context(agreed)
        yield


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Let a CPU compute as a GPU does, where kernels differ in the memory they need."""
    with (
        patch.object(experts, "looped_mixture", grouped_mixture),
        patch.object(norm, "rms_norm", fused_rms_norm),
    ):
        yield


def update_as_gpus_do(optimizer: torch.optim.Optimizer) -> None:
    """Take all weights at once, as torch's AdamW does on GPUs, with temporaries as large."""
    for group in optimizer.param_groups:
        group["foreach"] = True


def with_all_to_all(config: Config) -> Config:
    """The configuration with a dispatcher that runs without a GPU."""
    parallel = config.parallel.model_copy(update={"dispatcher": "all_to_all"})
    return config.model_copy(update={"parallel": parallel})


def drop_nothing(parallelised: Parallelised) -> None:
    """Do not count the slots over capacity: with even routing there are none."""
    for stage in parallelised.stages:
        for module in stage.modules():
            if isinstance(module, MoE) and isinstance(module.dispatch, partial):
                module.dispatch = partial(dispatch_locally, dropless=True)


class Elsewhere(Store):
    """Where tensors take no memory of the device."""

    def __init__(self) -> None:
        super().__init__(limit=None)

    def _put(self, tensor: Tensor) -> Handle:
        self._take(tensor.nbytes)
        handle = _Away(tensor.shape, tensor.dtype)
        weakref.finalize(handle, self._give_back, tensor.nbytes)
        return handle


class _Away(Handle):
    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self._coming: Tensor | None = None

    def prefetch(self) -> None:
        if self._coming is None:
            self._coming = torch.empty(self.shape, dtype=self.dtype)

    def _arrived(self) -> Tensor:
        assert self._coming is not None
        tensor, self._coming = self._coming, None
        return tensor


class _GroupedProducts(TorchDispatchMode):
    """`grouped_mm` for fake tensors of any type; torch's own takes bfloat16 only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            return _grouped_product(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _grouped_product(a: Tensor, b: Tensor, offs: Tensor, *_: Any) -> Tensor:
    """Rows of a [N, k] in groups, by b [E, k, m] -> [N, m]; or a [m, N], b [N, k] -> [E, m, k]."""
    if b.ndim == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])


def _even_routes(config: Config, layout: Layout) -> Callable[..., Any]:
    """`AllToAllDispatch.route` for even routing: a token goes once to each of its ranks."""
    moe, ep, route = config.model.moe, layout.ep, AllToAllDispatch.route
    elsewhere = math.comb(moe.n_experts - moe.n_experts // ep, moe.top_k)
    # A dense model routes nothing.
    share = 1 - elsewhere / max(1, math.comb(moe.n_experts, moe.top_k))

    def even_route(dispatch: AllToAllDispatch, expert_indices: Tensor) -> Route:
        # Of a microbatch, a segment or a tile, and of as many on each rank.
        rows = round(len(expert_indices) * share)
        counts = [rows] * ep, [rows] * ep, [expert_indices.numel() // ep] * ep
        with patch.object(dispatch, "counts_on_host", lambda *_: counts):
            return route(dispatch, expert_indices)

    return even_route


def _first_and_last(blocks: Callable[[Tensor], Iterator[Any]]) -> Callable[[Tensor], list[Any]]:
    def first_and_last(x: Tensor) -> list[Any]:
        every = list(blocks(x))
        return every[:1] + every[1:][-1:]

    return first_and_last


def _agree_on_shapes(_schedule: Any, stages: Any, *_: Any) -> None:
    """In place of a vote of the pipeline's ranks on whether they know what they exchange."""
    for stage in stages:
        stage._inference_mode = torch.distributed.pipelining.stage.InferenceMode.STATIC
