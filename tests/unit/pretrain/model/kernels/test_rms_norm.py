"""The norm against torch's, with gradients, over several blocks and on parts of a tensor."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.kernels.rms_norm import BLOCK_ELEMENTS, rms_norm

DIM, HEADS = 16, 3
TOKENS = BLOCK_ELEMENTS // (2 * HEADS * DIM) + 1


def random_heads(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two inputs [2, TOKENS, HEADS, DIM], each a part of the columns of one tensor."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, TOKENS, 2 * HEADS * DIM, generator=generator, dtype=dtype)
    x, gate = both.requires_grad_().unflatten(-1, (-1, DIM)).chunk(2, dim=2)
    return x, gate


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equals_torch(is_gated: bool, dtype: torch.dtype, tolerance: float) -> None:
    x, gate = random_heads(dtype)
    scale = torch.linspace(-1, 2, DIM, dtype=dtype).requires_grad_()
    out = rms_norm(x, scale, 1e-3, gate if is_gated else None)
    expected = F.rms_norm(x, scale.shape, scale, 1e-3) * (F.silu(gate) if is_gated else 1)

    inputs = [x, scale, gate] if is_gated else [x, scale]
    d_out = torch.linspace(-1, 1, out.numel(), dtype=dtype).sin().view_as(out)
    ours = [out, *torch.autograd.grad(out, inputs, d_out)]
    theirs = [expected, *torch.autograd.grad(expected, inputs, d_out)]
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_bfloat16_is_rounded_only_once() -> None:
    x, gate = random_heads(torch.float64)
    x, gate = x.detach().bfloat16(), gate.detach().bfloat16()
    scale = torch.linspace(-1, 2, DIM)
    exact = F.rms_norm(x.double(), (DIM,), scale.double(), 1e-3) * F.silu(gate.double())
    out = rms_norm(x, scale, 1e-3, gate)
    assert out.dtype == torch.bfloat16
    assert (out == exact.bfloat16()).float().mean() > 0.999
