"""Sliding-window attention under `cp`: a rank fetches the few keys that its queries see."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.comm import Communicator, keep_as_one
from parallel.context.documents import SplitDocuments
from parallel.context.halo import Route, plan_route
from parallel.layout import RowLayout, overlap
from pretrain.model.kernels.attention import (
    Block,
    attend,
    attend_backward,
    lse_like,
)
from pretrain.model.kernels.pieces import visible_pieces


class WindowPlan:
    """What a rank computes with its own keys, and with those that it fetches.

    Attributes:
        route: how keys travel.
        n_before: keys before the row, which all ranks have, in front of the rank's own.
        own: blocks with the keys before the row and the rank's own.
        fetched: row and block of each, the keys by their place in what has arrived.
    """

    def __init__(self, documents: SplitDocuments, window: int, device: torch.device) -> None:
        self.route: Route = plan_route(documents, partial(keys_before, window=window), device)
        self.n_before = window - 1 if documents.go_on else 0
        self.own: list[Block] = []
        self.fetched: list[tuple[int, Block]] = []
        for rows, layout in documents.groups():
            self.own += _own_blocks(rows, layout, documents.rank, window, self.n_before)
        for row, tokens, place in self.route.arrivals:
            parts = documents.layouts[row].parts_of(documents.rank)
            for document, part, query_place in parts:
                keys = overlap(document, tokens)
                if keys and keys.start < part.start:
                    blocks = _blocks(slice(1), part, query_place, keys, tokens, place, window)
                    self.fetched += ((row, block) for block in blocks)

    def leaving(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Row and place in k [B, Hkv, n_before + t, D] of the keys that other ranks fetch."""
        row, token = self.route.places(k.shape[2] - self.n_before)
        return row, token + self.n_before


def keys_before(layout: RowLayout, rank: int, window: int) -> list[range]:
    """The keys before a rank's blocks that its queries see, each once."""
    seen: list[range] = []
    for document, part, _ in layout.parts_of(rank):
        start = max(document.start, part.start - window + 1)
        if seen and start <= seen[-1].stop:
            start = seen.pop().start
        seen.append(range(start, part.start))
    return seen


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: WindowPlan, comm: Communicator, *, scale: float
) -> Tensor:
    """Attention of this rank's queries within their windows; differentiable.

    Sends at most window - 1 keys and values for each block of another rank, and receives as many
    for each of its own, whatever the length of the sequence; their gradients return in float32.

    Args:
        q: [B, H, t, D], of this rank's tokens.
        k, v: [B, Hkv, t, D]; where a row begins in the middle of a document, the window - 1 keys
            before it, equal on all ranks, and these.
    """
    out: Tensor = _WindowAttention.apply(q, k, v, plan, comm, scale)
    return out


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: WindowPlan,
        comm: Communicator,
        scale: float,
    ) -> Tensor:
        out, lse, kv = keep_as_one(partial(_attend_in_window, q, k, v, plan, comm, scale))
        ctx.save_for_backward(q, k, v, kv, out, lse)
        ctx.plan, ctx.comm, ctx.scale = plan, comm, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, kv, out, lse = ctx.saved_tensors
        plan, route = ctx.plan, ctx.plan.route
        dq, dk, dv, d_kv = (
            torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v, kv)
        )
        for number, block in plan.fetched:
            of_row = tuple(x[number : number + 1] for x in (d_out, q, out, lse, dq))
            d_out_row, q_row, out_row, lse_row, dq_row = of_row
            gradients = (dq_row, d_kv[0], d_kv[1])
            tensors = (d_out_row, q_row, kv[0], kv[1], out_row, lse_row)
            attend_backward(*tensors, gradients, block, ctx.scale)
        returning = ctx.comm.start_exchange(_as_tokens(d_kv), route.sent, route.received)
        for block in plan.own:
            attend_backward(d_out, q, k, v, out, lse, (dq, dk, dv), block, ctx.scale)
        row, token = plan.leaving(k)
        of_keys, of_values = returning.wait().unbind(1)
        # Indices apart around a slice put the token first: [sent, Hkv, D].
        dk.transpose(1, 2).index_put_((row, token), of_keys, accumulate=True)
        dv.transpose(1, 2).index_put_((row, token), of_values, accumulate=True)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _attend_in_window(
    q: Tensor, k: Tensor, v: Tensor, plan: WindowPlan, comm: Communicator, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the log-sum-exp, and the keys and values that were fetched."""
    route = plan.route
    row, token = plan.leaving(k)
    leaving = torch.stack([k[row, :, token], v[row, :, token]], dim=1)
    arriving = comm.start_exchange(leaving, route.received, route.sent)
    lse = lse_like(q)
    merged = torch.empty(q.shape, dtype=lse.dtype, device=q.device)
    for block in plan.own:
        attend(q, k, v, merged, lse, block, scale)
    kv = _as_one_row(arriving.wait())
    for number, block in plan.fetched:
        q_row, merged_row, lse_row = (x[number : number + 1] for x in (q, merged, lse))
        attend(q_row, kv[0], kv[1], merged_row, lse_row, block, scale)
    return merged.to(q.dtype), lse, kv


def _as_one_row(kv: Tensor) -> Tensor:
    """[tokens, 2, Hkv, D] -> [2, 1, Hkv, tokens, D]."""
    return kv.movedim(0, 2).unsqueeze(1)


def _as_tokens(kv: Tensor) -> Tensor:
    """The reverse of `_as_one_row`."""
    return kv.squeeze(1).movedim(2, 0)


def _own_blocks(
    rows: slice, layout: RowLayout, rank: int, window: int, n_before: int
) -> Iterator[Block]:
    for document, part, place in layout.parts_of(rank):
        seen = range(max(document.start, part.start - window + 1), part.stop)
        for keys, owner, key_place in reversed(list(layout.holders(seen))):
            if owner == rank:
                yield from _blocks(rows, part, place, keys, keys, n_before + key_place, window)
        before = range(max(-layout.earlier, part.start - window + 1), 0)
        if document.start == 0 and before:
            held = range(-n_before, 0)
            yield from _blocks(rows, part, place, before, held, 0, window)


def _blocks(
    rows: slice,
    part: range,
    place: int,
    keys: range,
    held: range,
    held_place: int,
    window: int,
) -> Iterator[Block]:
    """What a part of a document, held from `place` on, sees of `keys` among `held` tokens."""
    for queries, seen, mask in visible_pieces(part, keys, window):
        to_queries, to_keys = place - part.start, held_place - held.start
        yield Block(
            rows,
            slice(queries.start + to_queries, queries.stop + to_queries),
            slice(seen.start + to_keys, seen.stop + to_keys),
            mask,
        )
