"""Causal softmax attention within each document of a packed batch."""

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.model.kernels.block_attention import block_attention, block_attention_backward
from pretrain.model.kernels.documents import Documents


def documents_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, *, scale: float
) -> Tensor:
    """Every token attends to itself and to the earlier tokens of its document, exactly.

    q is [B, H, T, D], k and v are [B, Hkv, T, D] with H a multiple of Hkv; returns [B, H, T, D].
    """
    if documents.position.shape != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"documents_attention: documents of {tuple(documents.position.shape)} tokens do not "
            f"belong to q {tuple(q.shape)}, which has {(q.shape[0], q.shape[2])}"
        )
    return _DocumentsAttention.apply(q, k, v, documents, scale)


class _DocumentsAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float
    ) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.empty(q.shape[:-1], dtype=lse_dtype, device=q.device)
        for piece in _pieces(documents):
            out[piece], lse[piece] = block_attention(
                q[piece], k[piece], v[piece], causal=True, scale=scale
            )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.documents, ctx.scale = documents, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        for piece in _pieces(ctx.documents):
            dq[piece], dk[piece], dv[piece] = block_attention_backward(
                d_out[piece],
                q[piece],
                k[piece],
                v[piece],
                out[piece],
                lse[piece],
                causal=True,
                scale=ctx.scale,
            )
        return dq, dk, dv, None, None


def _pieces(documents: Documents) -> Iterator[tuple[slice, slice, slice]]:
    """Indices into [B, H, T, ...]: the whole batch, or one document after the other."""
    B, T = documents.position.shape
    if not documents.is_packed:
        yield slice(B), slice(None), slice(T)
        return
    for row, lengths in enumerate(documents.lengths):
        for start, stop in pairwise(accumulate(lengths, initial=0)):
            yield slice(row, row + 1), slice(None), slice(start, stop)
