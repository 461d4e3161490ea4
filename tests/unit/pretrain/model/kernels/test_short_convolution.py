"""The short convolution against torch's conv1d and silu, document by document."""

import pytest
import torch
from torch.nn import functional as F

from pretrain.model.kernels.documents import Documents
from pretrain.model.kernels.short_convolution import BLOCK_TOKENS, short_convolution


def silu_conv1d(x, weight):
    """[B, T, C] -> [B, T, C], one document per row."""
    padded = F.pad(x.mT, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight.unsqueeze(1), groups=weight.shape[0]).mT)


def random_inputs(length, width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, length, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, width, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("length", [1, 3, BLOCK_TOKENS, 2 * BLOCK_TOKENS + 2])
def test_equals_conv1d_and_silu(length, width):
    x, weight = random_inputs(length, width)
    y, expected = short_convolution(x, weight), silu_conv1d(x, weight)
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, weight), dy),
        torch.autograd.grad(expected, (x, weight), dy),
        rtol=0,
        atol=1e-11,
    )


def test_packed_documents_equal_separate_ones():
    n = BLOCK_TOKENS
    rows = [[n - 1, 1, 1, n + 1, 3], [n, 2, n + 3]]
    x, weight = random_inputs(2 * n + 5, 4)
    packed = short_convolution(x, weight, Documents.from_lengths(rows))
    separate = torch.cat(
        [
            torch.cat(
                [silu_conv1d(document, weight) for document in row.unsqueeze(0).split(lengths, 1)],
                1,
            )
            for row, lengths in zip(x, rows, strict=True)
        ]
    )
    dy = torch.randn_like(packed)
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(packed, (x, weight), dy),
        torch.autograd.grad(separate, (x, weight), dy),
        rtol=0,
        atol=1e-11,
    )


def test_bfloat16_is_rounded_only_once():
    x, weight = random_inputs(300, 4, torch.bfloat16)
    exact = silu_conv1d(x.double(), weight.double())
    assert torch.equal(short_convolution(x, weight), exact.to(torch.bfloat16))


def test_refuses_other_channels_and_other_documents():
    x, weight = random_inputs(8, 4)
    with pytest.raises(ValueError, match=r"\[C, W\]"):
        short_convolution(x, weight[:5])
    with pytest.raises(ValueError, match=r"\(1, 8\)"):
        short_convolution(x, weight, Documents.whole_rows(1, 8))
