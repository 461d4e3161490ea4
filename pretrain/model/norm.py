"""Normalisation, computed in fp32 whatever the model's dtype."""

import torch
from torch import Tensor, nn

from pretrain.model.kernels.rms_norm import rms_norm


def upcast(x: Tensor) -> Tensor:
    """`x` in fp32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / |x| over the last dimension, in fp32."""
    dim = x.shape[-1]
    x = upcast(x)
    return rms_norm(x, x.new_full((dim,), dim**-0.5), eps / dim)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467).

    With `zero_centered` the scale is 1 + weight, so that weight decay pulls it towards 1.
    """

    def __init__(self, dim: int, eps: float, zero_centered: bool) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = zero_centered
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Norm of x [..., dim], times silu(gate) where there is a gate of the same shape."""
        scale = upcast(self.weight)
        if self.zero_centered:
            scale = 1 + scale
        return rms_norm(x, scale, self.eps, gate)
