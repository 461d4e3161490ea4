"""Root-mean-square norm over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467).

torch makes it of operations that each go through memory; on a CPU, blocks of tokens that stay in
the cache take half the time, and nothing but the input and a number per row is kept.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.model.kernels.needed import as_inner_nodes, is_needed

BLOCK_ELEMENTS = 1 << 17


def rms_norm(x: Tensor, scale: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * scale, and times silu(gate) where there is a gate.

    Args:
        x, gate: [..., D]
        scale: [D] in fp32 or wider, the dtype of the computation.
        eps: added to the mean square.

    Returns:
        [..., D] in the dtype of x.
    """
    if x.device.type != "cpu":
        return fused_rms_norm(x, scale, eps, gate)
    normed: Tensor
    if gate is None:
        normed = _RMSNorm.apply(*as_inner_nodes(x, scale), None, eps)
    else:
        normed = _RMSNorm.apply(*as_inner_nodes(x, scale, gate), eps)
    return normed


def fused_rms_norm(x: Tensor, scale: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    """`rms_norm` by torch's own kernel, the faster one on GPUs."""
    normed = F.rms_norm(x.to(scale.dtype), scale.shape, scale, eps)
    return (normed if gate is None else normed * F.silu(gate.to(scale.dtype))).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, gate: Tensor | None, eps: float) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype)
        x_rows, y_rows = _by_token(x), _by_token(y)
        inverse_rms = torch.empty(*x_rows.shape[:-1], 1, dtype=scale.dtype)
        for rows in _blocks(x_rows):
            x_block = x_rows[rows].to(scale.dtype)
            mean_square = x_block.square().mean(-1, keepdim=True)
            # The square of what overflows is infinite, and would pass as a harmless zero.
            mean_square.masked_fill_(mean_square.isinf(), math.nan)
            inverse_rms[rows] = mean_square.add_(eps).rsqrt_()
            y_block = (x_block * inverse_rms[rows]).mul_(scale)
            if gate is not None:
                y_block.mul_(F.silu(_by_token(gate)[rows].to(scale.dtype)))
            y_rows[rows] = y_block
        ctx.save_for_backward(x, scale, gate, inverse_rms)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """With n = x / rms: d_scale = sum of dy n, dx = (dy scale - n mean(dy n scale)) / rms."""
        x, scale, gate, inverse_rms = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype) if is_needed(ctx, 0) else None
        d_scale = torch.zeros_like(scale) if is_needed(ctx, 1) else None
        d_gate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype)
        x_rows, dy_rows = _by_token(x), _by_token(dy)
        for rows in _blocks(x_rows):
            normed = x_rows[rows] * inverse_rms[rows]
            dy_block = dy_rows[rows].to(scale.dtype)
            if gate is not None and d_gate is not None:
                gate_block = _by_token(gate)[rows].to(scale.dtype)
                d_silu = (dy_block * normed).mul_(scale)
                _by_token(d_gate)[rows] = torch.ops.aten.silu_backward(d_silu, gate_block)
                dy_block = dy_block * F.silu(gate_block)
            dy_normed = dy_block * normed
            if d_scale is not None:
                d_scale += dy_normed.flatten(0, -2).sum(0)
            if dx is not None:
                mean = (dy_normed @ scale).div_(len(scale)).unsqueeze(-1)
                d_normed = (dy_block * scale).addcmul_(normed, mean, value=-1)
                _by_token(dx)[rows] = d_normed.mul_(inverse_rms[rows])
        return dx, d_scale, d_gate, None


def _by_token(x: Tensor) -> Tensor:
    """[B, T, ...] as [B * T, ...], not copied where it is a part of the columns of a tensor."""
    return x.flatten(0, 1) if x.ndim > 2 else x


def _blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the first dimension that fit the cache."""
    rows = max(1, BLOCK_ELEMENTS // max(1, x[:1].numel()))
    for start in range(0, len(x), rows):
        yield slice(start, start + rows)
