"""Which gradients a hand-written backward has to compute.

A zero-bubble pipeline (Qi et al. 2023, arXiv:2401.10241) goes backward twice, by inputs and then
by weights. torch's own functions then compute what is asked for; `ctx.needs_input_grad` of an
`autograd.Function` says what was asked for in the forward pass.
"""

from typing import Any

import torch
from torch import Tensor


def as_inner_nodes(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors, never leaves: autograd cannot tell whether it is to stop at a leaf."""
    return tuple(tensor.view_as(tensor) for tensor in tensors)


def is_needed(ctx: Any, tensor: int) -> bool:
    """Whether this backward pass goes on to the function's input `tensor`.

    Args:
        ctx: of the running backward.
        tensor: counts the function's inputs that are tensors; one of `as_inner_nodes`.
    """
    node, _ = ctx.next_functions[tensor]
    return node is not None and torch._C._will_engine_execute_node(node)
