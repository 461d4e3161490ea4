"""Short causal depthwise convolution over time that stops at document boundaries.

Blocks of tokens that fit the cache, summed in float32: 2.5 times faster than conv1d on CPU.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pretrain.model.kernels.documents import Documents
from pretrain.model.kernels.needed import as_inner_nodes, is_needed

BLOCK_TOKENS = 128


def short_convolution(x: Tensor, weight: Tensor, documents: Documents | None = None) -> Tensor:
    """y[b, t, c] = sum over lags of weight[c, W - 1 - lag] * x[b, t - lag, c].

    Args:
        x: [B, T, C].
        weight: [C, W]; the last tap is the current token's.
        documents: taps that would read another document count as zero, as before the row's start.

    Returns:
        y [B, T, C].
    """
    if x.ndim != 3 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"short_convolution: x {tuple(x.shape)} and weight {tuple(weight.shape)} must be "
            "[B, T, C] and [C, W]"
        )
    if documents is not None and documents.position.shape != x.shape[:2]:
        raise ValueError(
            f"short_convolution: documents of {tuple(documents.position.shape)} tokens do not "
            f"belong to x {tuple(x.shape)}"
        )
    position = documents.position if documents is not None and documents.is_packed else None
    return _ShortConvolution.apply(*as_inner_nodes(x, weight), position)


class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, position: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, position)
        taps = _taps(weight, x)
        past = len(taps) - 1
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for start, stop in _blocks(x.shape[1]):
            x_block = _window(x, start - past, stop)
            y_block = x_block[:, past:] * taps[0]
            for lag in range(1, past + 1):
                x_lagged = x_block[:, past - lag : -lag]
                y_block.addcmul_(_visible(x_lagged, position, start, lag), taps[lag])
            y[:, start:stop] = y_block
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, position = ctx.saved_tensors
        dx = _gradient_of_x(dy, x, weight, position) if is_needed(ctx, 0) else None
        d_weight = _gradient_of_weight(dy, x, weight, position) if is_needed(ctx, 1) else None
        return dx, d_weight, None


def _gradient_of_x(dy: Tensor, x: Tensor, weight: Tensor, position: Tensor | None) -> Tensor:
    taps = _taps(weight, x)
    past = len(taps) - 1
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for start, stop in _blocks(x.shape[1]):
        n = stop - start
        dy_block = _window(dy, start, stop + past)
        dx_block = dy_block[:, :n] * taps[0]
        for lag in range(1, past + 1):
            dy_ahead = _visible(dy_block[:, lag : lag + n], position, start + lag, lag)
            dx_block.addcmul_(dy_ahead, taps[lag])
        dx[:, start:stop] = dx_block
    return dx


def _gradient_of_weight(dy: Tensor, x: Tensor, weight: Tensor, position: Tensor | None) -> Tensor:
    d_taps = torch.zeros_like(_taps(weight, x))
    past = len(d_taps) - 1
    for start, stop in _blocks(x.shape[1]):
        x_block = _window(x, start - past, stop)
        dy_block = _window(dy, start, stop)
        d_taps[0] += (dy_block * x_block[:, past:]).sum((0, 1))
        for lag in range(1, past + 1):
            x_lagged = _visible(x_block[:, past - lag : -lag], position, start, lag)
            d_taps[lag] += (dy_block * x_lagged).sum((0, 1))
    return d_taps.flip(0).T.to(weight.dtype)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, BLOCK_TOKENS):
        yield start, min(start + BLOCK_TOKENS, length)


def _taps(weight: Tensor, x: Tensor) -> Tensor:
    """[W, C], indexed by the lag, in the dtype of the sums."""
    return weight.T.flip(0).to(_sum_dtype(x))


def _window(x: Tensor, start: int, stop: int) -> Tensor:
    """The tokens start..stop of every row, zeros outside the row, in the dtype of the sums."""
    before, after = max(-start, 0), max(stop - x.shape[1], 0)
    inside = x[:, start + before : stop - after]
    return F.pad(inside, (0, 0, before, after)).to(_sum_dtype(x))


def _visible(x: Tensor, position: Tensor | None, start: int, lag: int) -> Tensor:
    """x with zeros where the token start + i and the one `lag` before differ in document."""
    if position is None:
        return x
    window = position[:, start : start + x.shape[1]]
    window = F.pad(window, (0, x.shape[1] - window.shape[1]))
    return x * (window >= lag).unsqueeze(-1)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
