"""The norm of a gradient before ZeRO's optimizers step, which tell it after the update only."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import (
    combine_grad_norm_groups,
    get_global_norm_of_tensors,
    is_invalid_grad_norm,
)
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3


def gradient_norm(optimizer: Any) -> float:
    """Of the whole gradient that `optimizer`, one of ZeRO's, would step with: as its `step` takes
    it, infinite where it is not finite. Collective.
    """
    if isinstance(optimizer, BF16_Optimizer):
        gradients, _ = optimizer.get_grads_for_norm()
        norm = get_global_norm_of_tensors(gradients)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        norm = combine_grad_norm_groups(optimizer._get_norm_groups())
    else:
        norm = optimizer.scaled_global_norm()
    return math.inf if is_invalid_grad_norm(norm) else float(norm)


@contextmanager
def refused(optimizer: Any) -> Iterator[None]:
    """Let `optimizer` find its gradient infinite: its `step` then forgets it, and no more."""
    infinite = torch.tensor(math.inf)
    found: tuple[str, Any] = "scaled_global_norm", infinite
    if isinstance(optimizer, BF16_Optimizer):
        found = "get_grads_for_norm", ([infinite], {})
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        found = "_get_norm_groups", [infinite]
    name, norm = found
    setattr(optimizer, name, lambda: norm)
    try:
        yield
    finally:
        delattr(optimizer, name)
    if name == "scaled_global_norm":
        # Of bf16 on the host, DeepSpeed 0.19.8 would add the next gradient to this one.
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None
