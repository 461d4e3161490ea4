"""Activation recompute: the backward pass computes activations again instead of keeping them.

Chen et al. 2016, arXiv:1604.06174; selective: Korthikanti et al. 2022, arXiv:2205.05198, section 5.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, noop_context_fn

Recompute = Literal["none", "selective", "full"]

# A shorter sum costs as little as an element-wise operation over the same outputs.
SHORTEST_KEPT_SUM = 16


def recompute_layers(layers: Mapping[str, nn.Module], modes: Sequence[Recompute]) -> None:
    """Let layers recompute their activations in the backward pass. Names of weights stay.

    `full` keeps a layer's inputs only. `selective` also keeps the results of matrix products,
    attention, scans and collectives, and recomputes the rest, which is cheap.

    Args:
        layers: keyed by the layer's number in the whole model.
        modes: repeated over the layers of the whole model.
    """
    for number, layer in layers.items():
        mode = modes[int(number) % len(modes)]
        if mode != "none":
            contexts = _keep_and_replay if mode == "selective" else noop_context_fn
            layer.forward = _checkpointed(layer.forward, contexts)


def _checkpointed(forward: Callable[..., Any], contexts: Callable[[], Any]) -> Callable[..., Any]:
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=contexts,
            **kwargs,
        )

    return checkpointed


def _keep_and_replay() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    kept: list[Any] = []
    return _Keep(kept), _Replay(kept)


class _Keep(TorchDispatchMode):
    """Keep the results of expensive operations, in the order of their calls."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_expensive(func, args):
            self.kept.append(_detach(result))
        return result


class _Replay(TorchDispatchMode):
    """Return what `_Keep` kept instead of computing it.

    Unlike torch's selective contexts it can be entered more than once (a zero-bubble schedule
    goes backward twice), and does not mind that FSDP gathers weights in one pass only.
    """

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = kept
        self.position = 0

    def __enter__(self) -> Any:
        self.position = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_expensive(func, args):
            return func(*args, **(kwargs or {}))
        result = self.kept[self.position]
        self.position += 1
        return _detach(result)


def _detach(result: Any) -> Any:
    """Autograd writes into the tensors an operation returns: keep, and hand out, aliases."""
    return tree_map_only(Tensor, lambda x: x.detach(), result)


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


def _is_expensive(func: Any, args: tuple[Any, ...]) -> bool:
    if func in MATRIX_PRODUCTS:
        # In a kernel's own autograd function, where gradients are off, products are details.
        summed = args[MATRIX_PRODUCTS[func]].shape[-1]
        return torch.is_grad_enabled() and summed >= SHORTEST_KEPT_SUM
    return func in ATTENTION or func.namespace == "farspan"
