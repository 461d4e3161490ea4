"""What megatron-core 0.16.1 takes for granted about CUDA, and a CPU has not.

Nothing here computes: devices become the CPU, and streams, which only order work, do nothing. The
layers, the schedules and the collectives are megatron-core's own.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from torch import Tensor
from torch.overrides import TorchFunctionMode


class CudaIsCpu(TorchFunctionMode):
    """Leaves on the CPU, unpinned, what is asked for with device="cuda" or moved by `cuda()`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1 and not kwargs:
            # The optimizer takes no weights but those of a type whose name has "cuda" in it.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


class Stream:
    """Work on a CPU is done when the call returns: there is nothing to wait for."""

    def wait_stream(self, other: "Stream") -> None: ...

    def record_event(self) -> "Stream":
        return self

    def synchronize(self) -> None: ...


def counts_on_host(counts: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """`moe_utils.maybe_move_tensor_to_cpu`, which leaves what is not on a GPU as a tensor."""
    return counts.numpy() if as_numpy and isinstance(counts, Tensor) else counts


@contextlib.contextmanager
def on_any_device() -> Iterator[None]:
    """Inside, megatron-core runs on the CPU, if there is no GPU. Also a decorator."""
    if not hasattr(moe_utils, "te_general_gemm"):
        # Left undefined where Transformer Engine is missing, GPU or not, yet compared with None.
        moe_utils.te_general_gemm = None
    if torch.cuda.is_available():
        yield
        return
    stream = Stream()
    with (
        patch.multiple(
            torch.cuda,
            current_device=lambda: torch.device("cpu"),
            Stream=Stream,
            current_stream=lambda: stream,
            stream=lambda _: contextlib.nullcontext(),
            synchronize=lambda: None,
        ),
        # No dropout, and the weights come from elsewhere: nothing is drawn, and recomputation has
        # no state of a generator to bring back.
        patch.object(random.CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext()),
        patch.object(random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
        patch.object(random, "_set_cuda_rng_state", lambda state, *_, **__: None),
        patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", counts_on_host),
        CudaIsCpu(),
    ):
        yield
