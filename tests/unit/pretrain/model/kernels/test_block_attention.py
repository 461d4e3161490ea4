"""Both backends against torch's scaled_dot_product_attention in float64, whole and in blocks."""

import pytest
import torch
from torch.nn import functional as F

from pretrain.model.kernels.block_attention import (
    BACKENDS,
    block_attention,
    block_attention_backward,
)

SCALE = 0.3


def random_qkv(n_queries, n_keys, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, length, 16, generator=generator, dtype=torch.float64)
        for heads, length in ((4, n_queries), (2, n_keys), (2, n_keys))
    )
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def expected(q, k, v, dout, causal):
    """Output and gradients by torch's own attention in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=SCALE, enable_gqa=True
        )
    return out, torch.autograd.grad(out, (q, k, v), dout.double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize(("n_queries", "n_keys", "causal"), [(65, 65, True), (33, 70, False)])
def test_equals_sdpa(backend, dtype, tolerance, n_queries, n_keys, causal):
    q, k, v = random_qkv(n_queries, n_keys, dtype)
    dout = torch.randn_like(q)
    options = {"causal": causal, "scale": SCALE, "backend": backend}

    with torch.no_grad():
        out, lse = block_attention(q, k, v, **options)
        gradients = block_attention_backward(dout, q, k, v, out, lse, **options)

    expected_out, expected_gradients = expected(q, k, v, dout, causal)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for x, y in zip((out, *gradients), (expected_out, *expected_gradients), strict=True):
        assert (x - y).norm() <= tolerance * y.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_keys_merge_by_lse_and_their_gradients_add_up(backend):
    q, k, v = random_qkv(40, 104)
    dout = torch.randn_like(q)
    options = {"causal": False, "scale": SCALE, "backend": backend}
    blocks = [(k[:, :, part], v[:, :, part]) for part in (slice(64), slice(64, 104))]

    with torch.no_grad():
        outs, lses = zip(*(block_attention(q, *block, **options) for block in blocks), strict=True)
        lse = torch.stack(lses).logsumexp(0)
        out = sum(o * (part - lse).exp().unsqueeze(-1) for o, part in zip(outs, lses, strict=True))
        dqs, dks, dvs = zip(
            *(block_attention_backward(dout, q, *kv, out, lse, **options) for kv in blocks),
            strict=True,
        )

    expected_out, (dq, dk, dv) = expected(q, k, v, dout, causal=False)
    torch.testing.assert_close(out, expected_out, rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(dqs), dq, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(dks, 2), dk, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(dvs, 2), dv, rtol=0, atol=1e-12)


def test_refuses_what_it_would_compute_wrongly():
    q, k, v = random_qkv(8, 16)
    with pytest.raises(ValueError, match="as many queries as keys, not 8 and 16"):
        block_attention(q, k, v, causal=True, scale=SCALE)
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        block_attention(q[:, :3], k, v, causal=False, scale=SCALE)
    with pytest.raises(ValueError, match="cpu_flash, reference"):
        block_attention(q, k, v, causal=False, scale=SCALE, backend="cpu-flash")
