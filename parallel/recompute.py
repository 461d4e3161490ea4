"""Activation recompute: the backward pass computes activations again instead of keeping them.

Chen et al. 2016, arXiv:1604.06174; selective: Korthikanti et al. 2022, arXiv:2205.05198, section 5.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from parallel.comm import CollectiveResults, aliases, is_recording
from parallel.offload import Store

Recompute = Literal["none", "selective", "full"]

# A shorter sum costs as little as an element-wise operation over the same outputs.
SHORTEST_KEPT_SUM = 16


def recompute_layers(
    layers: Mapping[str, nn.Module], modes: Sequence[Recompute], store: Store | None = None
) -> None:
    """Let layers recompute their activations in the backward pass. Names of weights stay.

    `full` keeps a layer's inputs only. `selective` also keeps the results of matrix products,
    attention, scans and collectives, and recomputes the rest, which is cheap.

    Args:
        layers: keyed by the layer's number in the whole model.
        modes: repeated over the layers of the whole model.
        store: where the layers' inputs wait for the backward pass; None leaves them on the device.
    """
    for number, layer in layers.items():
        mode = modes[int(number) % len(modes)]
        if mode != "none":
            layer.forward = _checkpointed(layer.forward, mode, store)


def recomputed(region: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`region(*args, **kwargs)`, which the backward pass calls again instead of keeping more than
    its arguments.
    """
    return checkpoint(region, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def is_second_pass() -> bool:
    """Whether a layer runs to find what its backward pass needs, and not for its result."""
    return _second_pass.get()


_second_pass: ContextVar[bool] = ContextVar("_second_pass", default=False)


@contextmanager
def _in_second_pass() -> Iterator[None]:
    token = _second_pass.set(True)
    try:
        yield
    finally:
        _second_pass.reset(token)


def _checkpointed(
    forward: Callable[..., Any], mode: Recompute, store: Store | None
) -> Callable[..., Any]:
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        region = _Selective(forward) if mode == "selective" else _Full(forward)
        # What the region itself saves, it recomputes: autograd saves its arguments only.
        with nullcontext() if store is None else store.keeping_saved_tensors():
            return recomputed(region, *args, **kwargs)

    return checkpointed


class _Full:
    """`forward`, which knows its second call from its first."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.has_run = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.has_run:
            with _in_second_pass():
                return self.forward(*args, **kwargs)
        self.has_run = True
        return self.forward(*args, **kwargs)


class _Selective:
    """`forward`, which from its second call on takes expensive results from the first.

    Unlike torch's selective contexts it can go backward twice, as zero-bubble schedules do, keeps
    the collectives that wait later, and does not mind that FSDP gathers weights in one pass only.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.results: list[Any] = []
        self.collectives = CollectiveResults()
        self.has_run = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.has_run:
            with _in_second_pass(), self.collectives.replaying(), _Replay(self.results):
                return self.forward(*args, **kwargs)
        self.has_run = True
        with self.collectives.recording(), _Keep(self.results):
            return self.forward(*args, **kwargs)


class _Keep(TorchDispatchMode):
    """Keep the results of expensive operations, in the order of their calls."""

    def __init__(self, results: list[Any]) -> None:
        super().__init__()
        self.results = results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_expensive(func, args) and is_recording():
            self.results.append(aliases(result))
        return result


class _Replay(TorchDispatchMode):
    """Return what `_Keep` kept instead of computing it."""

    def __init__(self, results: list[Any]) -> None:
        super().__init__()
        self.results = iter(results)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_expensive(func, args):
            return aliases(next(self.results))
        return func(*args, **(kwargs or {}))


aten = torch.ops.aten
# Operation -> which argument's last dimension is summed over.
MATRIX_PRODUCTS = {
    aten.mm.default: 0,
    aten.addmm.default: 1,
    aten.bmm.default: 0,
    aten.baddbmm.default: 1,
    aten._grouped_mm.default: 0,
}
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}

# Ours, and those of flash-attn 2 and 3.
KERNEL_NAMESPACES = {"farspan", "flash_attn", "flash_attn_3"}


def _is_expensive(func: Any, args: tuple[Any, ...]) -> bool:
    if func in MATRIX_PRODUCTS:
        # In a kernel's own autograd function, where gradients are off, products are details.
        summed = args[MATRIX_PRODUCTS[func]].shape[-1]
        return torch.is_grad_enabled() and summed >= SHORTEST_KEPT_SUM
    return func in ATTENTION or func.namespace in KERNEL_NAMESPACES
