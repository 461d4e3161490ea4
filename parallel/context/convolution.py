"""The short convolution under `cp`: a few tokens before each block come from other ranks."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from parallel.comm import Communicator
from parallel.context.documents import SplitDocuments
from parallel.context.halo import Arrival, fetch, plan_route
from parallel.layout import RowLayout
from pretrain.model.kernels.short_convolution import continued_convolution


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
        tokens, arrived = fetch(x.flatten(0, 1), plan.route, self.comm)
        # The last row stands for tokens that there are not.
        arrived = F.pad(arrived, (0, 0, 0, 1))
        n_rows = [len(group.before[0]) for group in plan.groups]
        rows = zip(
            plan.groups,
            tokens.view_as(x).split(n_rows),
            documents.position.split(n_rows),
            strict=True,
        )
        return torch.cat([_convolve(*of_group, arrived, weight) for of_group in rows])


class HaloGroup(NamedTuple):
    """Rows that are laid out alike.

    Attributes:
        sizes: tokens of each of this rank's blocks.
        before: of each block [rows, W - 1], the places of the tokens before it in what arrives.
        is_packed: whether there is more than one document.
    """

    sizes: list[int]
    before: list[Tensor]
    is_packed: bool


class HaloPlan:
    """Which tokens a rank fetches, and where its blocks need them."""

    def __init__(self, documents: SplitDocuments, past: int, device: torch.device) -> None:
        needs = partial(tokens_before, past=past)
        self.route = plan_route(documents, needs, device, own=True)
        self.groups = [
            HaloGroup(
                [len(block) for block in layout.blocks[documents.rank]],
                [
                    _places(self.route.arrivals, rows, block.start, past).to(device)
                    for block in layout.blocks[documents.rank]
                ],
                len(layout.lengths) > 1,
            )
            for rows, layout in documents.groups()
        ]


def tokens_before(layout: RowLayout, rank: int, past: int) -> Iterator[range]:
    """Up to `past` tokens before each of a rank's blocks, of the document that goes on in it."""
    blocks = {block.start for block in layout.blocks[rank]}
    for document, part, _ in layout.parts_of(rank):
        if part.start in blocks:
            yield range(max(document.start, part.start - past), part.start)


def _convolve(
    group: HaloGroup, x: Tensor, position: Tensor, arrived: Tensor, weight: Tensor
) -> Tensor:
    blocks = zip(group.before, x.split(group.sizes, 1), position.split(group.sizes, 1), strict=True)
    return torch.cat(
        [
            continued_convolution(
                arrived[before], block, weight, positions if group.is_packed else None
            )
            for before, block, positions in blocks
        ],
        dim=1,
    )


def _places(arrivals: list[Arrival], rows: slice, start: int, past: int) -> Tensor:
    """[rows, past], where the tokens before `start` have arrived; -1 where there are none."""
    row_numbers = range(rows.start or 0, rows.stop)
    places = torch.full((len(row_numbers), past), -1)
    for row, tokens, place in arrivals:
        if row in row_numbers:
            for token in range(max(tokens.start, start - past), min(tokens.stop, start)):
                at = row - row_numbers.start, token - start + past
                places[at] = place + token - tokens.start
    return places
