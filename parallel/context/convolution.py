"""The short convolution under `cp`: a few tokens before each block come from other ranks."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.comm import Communicator
from parallel.context.documents import SplitDocuments
from parallel.context.halo import Arrival, plan_route
from parallel.layout import RowLayout
from pretrain.model.kernels.needed import as_inner_nodes, is_needed
from pretrain.model.kernels.short_convolution import (
    convolve,
    convolve_backward,
    empty_like_rows,
    empty_taps,
    weight_of_taps,
)


class ContextConvolution:
    """Takes the place of `gated_delta.convolve`.

    A rank sends at most W - 1 tokens of C channels for each block, and as many gradients back,
    whatever the length of the sequence.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        documents: SplitDocuments,
        before: Tensor | None = None,
    ) -> Tensor:
        """x [B, t, C], of this rank's tokens, and weight [C, W] -> [B, t, C].

        `before` [B, W - 1, C], equal on all ranks, are the tokens before the rows, for rows that
        begin in the middle of a document; its gradient is that of this rank's tokens.
        """
        plan: HaloPlan = documents.plan(HaloPlan, weight.shape[1] - 1, x.device)
        tensors = as_inner_nodes(x, weight)
        return _ContextConvolution.apply(*tensors, before, plan, self.comm)


class _ContextConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        before: Tensor | None,
        plan: "HaloPlan",
        comm: Communicator,
    ) -> Tensor:
        route = plan.route
        leaving = x.flatten(0, 1).index_select(0, route.leaving)
        halo = comm.exchange(leaving, route.received, route.sent)
        y = empty_like_rows(x)
        for block in plan.blocks:
            tokens_before = _rows(halo, before, block)
            convolve(y[block.at], x[block.at], tokens_before, weight, block.position)
        ctx.save_for_backward(x, weight, before, halo)
        ctx.plan, ctx.comm = plan, comm
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, before, halo = ctx.saved_tensors
        route = ctx.plan.route
        d_taps = empty_taps(weight, x) if is_needed(ctx, 1) else None
        dx = d_halo = None
        d_before = None if before is None else torch.zeros_like(before)
        if is_needed(ctx, 0):
            dx, d_halo = empty_like_rows(x), torch.zeros_like(halo)
        for block in ctx.plan.blocks:
            tokens_before = _rows(halo, before, block)
            d_rows = None if dx is None else torch.empty_like(tokens_before)
            of_block = (dy[block.at], x[block.at], tokens_before, weight, block.position)
            convolve_backward(None if dx is None else dx[block.at], d_rows, d_taps, *of_block)
            if d_halo is not None and d_rows is not None:
                needed = d_rows.flatten(0, 1).index_select(0, block.into)
                d_halo.index_add_(0, block.arrived, needed)
            if d_before is not None and d_rows is not None and block.n_carried:
                rows, n = block.at[0], block.n_carried
                d_before[rows, d_before.shape[1] - n :] += d_rows[:, :n]
        if dx is not None and d_halo is not None:
            returned = ctx.comm.exchange(d_halo, route.sent, route.received)
            # A token may go to several ranks.
            dx.flatten(0, 1).index_add_(0, route.leaving, returned)
        d_weight = None if d_taps is None else weight_of_taps(d_taps, weight)
        return dx, d_weight, d_before, None, None


class HaloBlock(NamedTuple):
    """A block of this rank, of rows that are laid out alike.

    Attributes:
        at: where it lies in tensors [B, t, ...].
        position: [rows, tokens], of its tokens in their documents; None where there is only one.
        n_before: rows and W - 1.
        into: places in [rows * (W - 1)] of the tokens before it that there are.
        arrived: their places in what arrives.
        n_carried: how many of the tokens before it lie before the row.
    """

    at: tuple[slice, slice]
    position: Tensor | None
    n_before: tuple[int, int]
    into: Tensor
    arrived: Tensor
    n_carried: int


class HaloPlan:
    """Which tokens a rank fetches, and which blocks need them."""

    def __init__(self, documents: SplitDocuments, past: int, device: torch.device) -> None:
        needs = partial(tokens_before, past=past)
        self.route = plan_route(documents, needs, device, own=True)
        self.blocks: list[HaloBlock] = []
        for rows, layout in documents.groups():
            place = 0
            for block in layout.blocks[documents.rank]:
                at = (rows, slice(place, place + len(block)))
                place += len(block)
                starts_nearby = len(layout.lengths) > 1 or 0 < layout.earlier < past
                position = documents.position[at] if starts_nearby else None
                places = _arrived(self.route.arrivals, rows, block.start, past)
                into, arrived = (
                    torch.tensor(list(x), dtype=torch.int64).to(device)
                    for x in (places, places.values())
                )
                n_before = (rows.stop - rows.start, past)
                n_carried = max(0, past - block.start) if layout.earlier else 0
                self.blocks.append(HaloBlock(at, position, n_before, into, arrived, n_carried))


def tokens_before(layout: RowLayout, rank: int, past: int) -> Iterator[range]:
    """Up to `past` tokens before each of a rank's blocks, of the document that goes on in it."""
    for block in layout.blocks[rank]:
        document, _ = next(layout.parts_of_block(block))
        yield range(max(document.start, block.start - past), block.start)


def _rows(halo: Tensor, carried: Tensor | None, block: HaloBlock) -> Tensor:
    """[rows, W - 1, C], the tokens before a block; zeros where there are none."""
    before = halo.new_zeros(*block.n_before, halo.shape[1])
    before.flatten(0, 1).index_copy_(0, block.into, halo.index_select(0, block.arrived))
    if carried is not None and block.n_carried:
        n = block.n_carried
        before[:, :n] = carried[block.at[0], carried.shape[1] - n :]
    return before


def _arrived(arrivals: list[Arrival], rows: slice, start: int, past: int) -> dict[int, int]:
    """Where in [rows * past] the tokens before `start` belong, and where they have arrived."""
    places = {}
    for row, tokens, place in arrivals:
        if rows.start <= row < rows.stop:
            for token in range(max(tokens.start, start - past), min(tokens.stop, start)):
                into = (row - rows.start) * past + token - start + past
                places[into] = place + token - tokens.start
    return places
