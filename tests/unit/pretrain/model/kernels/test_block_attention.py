"""Every backend against torch's scaled_dot_product_attention in float64, whole and in blocks.

On a machine with a GPU its backends join.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.model.kernels.backends import Setting, usable_backends
from pretrain.model.kernels.block_attention import block_attention, block_attention_backward

SCALE = 0.3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}


def cases() -> Iterator[Any]:
    """(device, head_dim, dtype, backend) for each that can run here."""
    devices = [("cpu", 16)]
    if torch.cuda.is_available():
        devices += [("cuda", 64), ("cuda", 128), ("cuda", 256)]
    for device, head_dim in devices:
        for dtype in TOLERANCE:
            for backend in usable_backends(Setting.here(torch.device(device), dtype, head_dim)):
                name = f"{device}-{head_dim}-{str(dtype).removeprefix('torch.')}-{backend}"
                yield pytest.param(device, head_dim, dtype, backend, id=name)


def random_qkv(
    n_queries: int,
    n_keys: int,
    device: str = "cpu",
    head_dim: int = 16,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, n_queries), (2, n_keys), (2, n_keys))
    return [
        torch.randn(2, *shape, head_dim, generator=generator, dtype=torch.float64).to(device, dtype)
        for shape in shapes
    ]


def expected(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> list[Tensor]:
    """Output and gradients by torch's own attention in float64."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=SCALE, enable_gqa=True
        )
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.double())]


def assert_close(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> None:
    for x, y in zip(ours, theirs, strict=True):
        assert (x - y).norm() <= TOLERANCE[dtype] * y.norm()


@pytest.mark.parametrize(("n_queries", "n_keys", "causal"), [(65, 65, True), (33, 70, False)])
@pytest.mark.parametrize(("device", "head_dim", "dtype", "backend"), cases())
def test_equals_sdpa(
    device: str,
    head_dim: int,
    dtype: torch.dtype,
    backend: str,
    n_queries: int,
    n_keys: int,
    causal: bool,
) -> None:
    q, k, v = random_qkv(n_queries, n_keys, device, head_dim, dtype)
    dout = torch.randn_like(q)
    options: dict[str, Any] = {"causal": causal, "scale": SCALE, "backend": backend}

    out, lse = block_attention(q, k, v, **options)
    gradients = block_attention_backward(dout, q, k, v, out, lse, **options)

    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert lse.shape == q.shape[:-1]
    assert_close([out, *gradients], expected(q, k, v, dout, causal), dtype)


@pytest.mark.parametrize(("device", "head_dim", "dtype", "backend"), cases())
def test_blocks_of_keys_merge_by_lse_and_their_gradients_add_up(
    device: str, head_dim: int, dtype: torch.dtype, backend: str
) -> None:
    q, k, v = random_qkv(40, 104, device, head_dim, dtype)
    dout = torch.randn_like(q)
    options: dict[str, Any] = {"causal": False, "scale": SCALE, "backend": backend}
    blocks = [(k[:, :, part], v[:, :, part]) for part in (slice(64), slice(64, 104))]

    outs, lses = zip(*(block_attention(q, *block, **options) for block in blocks), strict=True)
    lse = torch.stack(lses).logsumexp(0)
    weights = [(part - lse).exp().unsqueeze(-1) for part in lses]
    out = sum(o * weight for o, weight in zip(outs, weights, strict=True)).to(dtype)
    dqs, dks, dvs = zip(
        *(block_attention_backward(dout, q, *kv, out, lse, **options) for kv in blocks),
        strict=True,
    )

    ours = [out, sum(dqs), torch.cat(dks, 2), torch.cat(dvs, 2)]
    assert_close(ours, expected(q, k, v, dout, causal=False), dtype)


def test_refuses_what_it_would_compute_wrongly() -> None:
    q, k, v = random_qkv(8, 16)
    with pytest.raises(ValueError, match="as many queries as keys, not 8 and 16"):
        block_attention(q, k, v, causal=True, scale=SCALE)
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        block_attention(q[:, :3], k, v, causal=False, scale=SCALE)
    with pytest.raises(ValueError, match=r"cpu_flash, .*reference"):
        block_attention(q, k, v, causal=False, scale=SCALE, backend="cpu-flash")
