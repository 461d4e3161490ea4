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

    def __call__(self, x: Tensor, weight: Tensor, documents: SplitDocuments) -> Tensor:
        """x [B, t, C], of this rank's tokens, and weight [C, W] -> [B, t, C]."""
        plan: HaloPlan = documents.plan(HaloPlan, weight.shape[1] - 1, x.device)
        return _ContextConvolution.apply(*as_inner_nodes(x, weight), plan, self.comm)


class _ContextConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, plan: "HaloPlan", comm: Communicator
    ) -> Tensor:
        route = plan.route
        leaving = x.flatten(0, 1).index_select(0, route.leaving)
        halo = comm.exchange(leaving, route.received, route.sent)
        y = empty_like_rows(x)
        for block in plan.blocks:
            convolve(y[block.at], x[block.at], _rows(halo, block), weight, block.position)
        ctx.save_for_backward(x, weight, halo)
        ctx.plan, ctx.comm = plan, comm
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, halo = ctx.saved_tensors
        route = ctx.plan.route
        d_taps = empty_taps(weight, x) if is_needed(ctx, 1) else None
        dx = d_halo = None
        if is_needed(ctx, 0):
            dx, d_halo = empty_like_rows(x), torch.zeros_like(halo)
        for block in ctx.plan.blocks:
            before = _rows(halo, block)
            d_before = None if dx is None else torch.empty_like(before)
            of_block = (dy[block.at], x[block.at], before, weight, block.position)
            convolve_backward(None if dx is None else dx[block.at], d_before, d_taps, *of_block)
            if d_halo is not None and d_before is not None:
                needed = d_before.flatten(0, 1).index_select(0, block.into)
                d_halo.index_add_(0, block.arrived, needed)
        if dx is not None and d_halo is not None:
            returned = ctx.comm.exchange(d_halo, route.sent, route.received)
            # A token may go to several ranks.
            dx.flatten(0, 1).index_add_(0, route.leaving, returned)
        return dx, None if d_taps is None else weight_of_taps(d_taps, weight), None, None


class HaloBlock(NamedTuple):
    """A block of this rank, of rows that are laid out alike.

    Attributes:
        at: where it lies in tensors [B, t, ...].
        position: [rows, tokens], of its tokens in their documents; None where there is only one.
        n_before: rows and W - 1.
        into: places in [rows * (W - 1)] of the tokens before it that there are.
        arrived: their places in what arrives.
    """

    at: tuple[slice, slice]
    position: Tensor | None
    n_before: tuple[int, int]
    into: Tensor
    arrived: Tensor


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
                position = documents.position[at] if len(layout.lengths) > 1 else None
                places = _arrived(self.route.arrivals, rows, block.start, past)
                into, arrived = (
                    torch.tensor(list(x), dtype=torch.int64).to(device)
                    for x in (places, places.values())
                )
                n_before = (rows.stop - rows.start, past)
                self.blocks.append(HaloBlock(at, position, n_before, into, arrived))


def tokens_before(layout: RowLayout, rank: int, past: int) -> Iterator[range]:
    """Up to `past` tokens before each of a rank's blocks, of the document that goes on in it."""
    for block in layout.blocks[rank]:
        document, _ = next(layout.parts_of_block(block))
        yield range(max(document.start, block.start - past), block.start)


def _rows(halo: Tensor, block: HaloBlock) -> Tensor:
    """[rows, W - 1, C], the tokens before a block; zeros where there are none."""
    before = halo.new_zeros(*block.n_before, halo.shape[1])
    before.flatten(0, 1).index_copy_(0, block.into, halo.index_select(0, block.arrived))
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
