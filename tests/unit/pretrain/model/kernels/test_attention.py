"""Packed attention against torch's scaled_dot_product_attention with an explicit mask."""

import pytest
import torch
from torch.nn import functional as F

from pretrain.model.kernels import attention
from pretrain.model.kernels.attention import SHORTEST_RECURRING, Block, documents_attention
from pretrain.model.kernels.documents import Documents

SCALE = 0.3


def random_qkv(dtype):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, heads, 130, 16, generator=generator).to(dtype).requires_grad_()
        for heads in (4, 2, 2)
    ]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize(
    "rows", [[[130], [130]], [[1, 63, 1, 65], [130]], [[65, 65], [129, 1]]], ids=str
)
@pytest.mark.parametrize("window", [None, 2, 5, 64, 129, 500])
def test_equals_masked_sdpa(rows, window, dtype, tolerance):
    documents = Documents.from_lengths(rows)
    q, k, v = random_qkv(dtype)
    dout = torch.randn_like(q)

    out = documents_attention(q, k, v, documents, scale=SCALE, window=window)
    gradients = torch.autograd.grad(out, (q, k, v), dout)

    same_document = torch.stack(
        [torch.block_diag(*(torch.ones(n, n) for n in lengths)) for lengths in rows]
    )
    visible = same_document.tril().bool()
    if window is not None:
        visible = visible.triu(1 - window)
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    expected = F.scaled_dot_product_attention(
        q, k, v, visible.unsqueeze(1), scale=SCALE, enable_gqa=True
    )
    expected_gradients = torch.autograd.grad(expected, (q, k, v), dout.double())
    assert out.dtype == dtype
    for x, y in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert (x - y).norm() <= tolerance * y.norm()


@pytest.mark.parametrize("window", [None, SHORTEST_RECURRING])
def test_kernels_are_made_for_no_block_of_a_few_tokens(window, monkeypatch):
    """cuDNN takes seconds for each new length, and refuses a single key."""
    blocks: list[Block] = []
    monkeypatch.setattr(attention, "attend", lambda *_: blocks.append(_[5]))
    T = 2 * SHORTEST_RECURRING + 1
    q = k = v = torch.zeros(1, 1, T, 1)
    documents_attention(q, k, v, Documents.whole_rows(1, T), scale=SCALE, window=window)
    assert any(block.recurs for block in blocks)
    for block in blocks:
        lengths = [tokens.stop - tokens.start for tokens in (block.queries, block.keys)]
        assert block.recurs == (min(lengths) >= SHORTEST_RECURRING)


def test_refuses_documents_of_another_batch():
    q, k, v = random_qkv(torch.float32)
    with pytest.raises(ValueError, match=r"\(2, 64\).*\(2, 130\)"):
        documents_attention(q, k, v, Documents.whole_rows(2, 64), scale=SCALE)
