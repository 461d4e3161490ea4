"""Causal softmax attention within each document of a packed batch, whole or by a sliding window."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.model.kernels.block_attention import block_attention, block_attention_backward
from pretrain.model.kernels.documents import Documents
from pretrain.model.kernels.pieces import Mask, visible_pieces

# From so many tokens on, blocks may be computed by kernels made for their lengths: of whole rows,
# each of which has them.
SHORTEST_RECURRING = 256


def documents_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Every token attends to itself and to the earlier tokens of its document, exactly.

    q is [B, H, T, D], k and v are [B, Hkv, T, D] with H a multiple of Hkv; returns [B, H, T, D].
    With `window` a token sees that many, the last of which is itself.
    """
    if documents.position.shape != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"documents_attention: documents of {tuple(documents.position.shape)} tokens do not "
            f"belong to q {tuple(q.shape)}, which has {(q.shape[0], q.shape[2])}"
        )
    return _DocumentsAttention.apply(q, k, v, list(_blocks(documents, window)), scale)


class Block(NamedTuple):
    """A piece of attention by its places in tensors [B, H, T, D].

    Attributes:
        recurs: whether other layers and batches have pieces of this shape.
    """

    rows: slice
    queries: slice
    keys: slice
    mask: Mask
    recurs: bool = False


def attend(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, scale: float
) -> None:
    """Merge what the block's queries read from its keys into `out` and `lse`.

    A causal block, which each query has one of and has first, overwrites them. `out` [B, H, Tq, D]
    may be wider than q; q is [B, H, Tq, D], k and v [B, Hkv, Tk, D], lse [B, H, Tq].
    """
    q, out, lse, k, v = _parts(block, (q, out, lse), (k, v))
    how: Any = {"scale": scale, "recurs": block.recurs}
    if block.mask == "reversed":
        flipped = (x.flip(2) for x in (q, k, v))
        block_out, block_lse = block_attention(*flipped, causal=True, **how)
        block_out, block_lse = block_out.flip(2), block_lse.flip(2)
    else:
        block_out, block_lse = block_attention(q, k, v, causal=block.mask == "causal", **how)
    if block.mask == "causal":
        out.copy_(block_out)
        lse.copy_(block_lse)
    else:
        total = torch.logaddexp(lse, block_lse)
        out.lerp_(block_out.to(out.dtype), (block_lse - total).exp_().unsqueeze(-1).to(out.dtype))
        lse.copy_(total)


def attend_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    gradients: Sequence[Tensor],
    block: Block,
    scale: float,
) -> None:
    """Add the block's part to the gradients of q, k and v; out and lse are the merged ones."""
    d_out, q, out, lse, k, v = _parts(block, (d_out, q, out, lse), (k, v))
    dq, dk, dv = _parts(block, gradients[:1], gradients[1:])
    is_reversed = block.mask == "reversed"
    if is_reversed:
        d_out, q, k, v, out, lse = (x.flip(2) for x in (d_out, q, k, v, out, lse))
    causal = block.mask != "full"
    parts = block_attention_backward(
        d_out, q, k, v, out, lse, causal=causal, scale=scale, recurs=block.recurs
    )
    for gradient, part in zip((dq, dk, dv), parts, strict=True):
        gradient += part.flip(2) if is_reversed else part


def lse_like(q: Tensor) -> Tensor:
    """Room for the log-sum-exp of queries [B, H, T, D]: [B, H, T], float32 or wider."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.empty(q.shape[:-1], dtype=dtype, device=q.device)


class _DocumentsAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: list[Block], scale: float
    ) -> Tensor:
        lse = lse_like(q)
        is_merged = any(block.mask != "causal" for block in blocks)
        dtype = lse.dtype if is_merged else q.dtype
        merged = torch.empty(q.shape, dtype=dtype, device=q.device)
        for block in blocks:
            attend(q, k, v, merged, lse, block, scale)
        out = merged.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        gradients = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        for block in ctx.blocks:
            attend_backward(d_out, q, k, v, out, lse, gradients, block, ctx.scale)
        return *gradients, None, None


def _parts(block: Block, of_queries: Any, of_keys: Any) -> Iterator[Tensor]:
    for tensors, tokens in ((of_queries, block.queries), (of_keys, block.keys)):
        yield from (x[block.rows, :, tokens] for x in tensors)


def _blocks(documents: Documents, window: int | None) -> Iterator[Block]:
    """The blocks of all rows at once, or of one document after the other."""
    B, T = documents.position.shape
    if not documents.is_packed:
        for block in _blocks_of(slice(B), range(T), window):
            shorter = min(tokens.stop - tokens.start for tokens in (block.queries, block.keys))
            yield block._replace(recurs=shorter >= SHORTEST_RECURRING)
        return
    for row, lengths in enumerate(documents.lengths):
        for start, stop in pairwise(accumulate(lengths, initial=0)):
            yield from _blocks_of(slice(row, row + 1), range(start, stop), window)


def _blocks_of(rows: slice, document: range, window: int | None) -> Iterator[Block]:
    for queries, keys, mask in visible_pieces(document, document, window):
        yield Block(rows, as_slice(queries), as_slice(keys), mask)


def as_slice(tokens: range) -> slice:
    return slice(tokens.start, tokens.stop)
