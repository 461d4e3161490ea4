"""Tokens of a row that a rank needs and others hold: a few before each of its blocks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.context.documents import SplitDocuments
from parallel.layout import RowLayout


class Arrival(NamedTuple):
    """Consecutive tokens of a row that have come from another rank.

    Attributes:
        row: of the batch.
        tokens: of the row.
        place: where the first of them stands in what has arrived.
    """

    row: int
    tokens: range
    place: int


@dataclass(frozen=True)
class Route:
    """What a rank sends to each other rank, and receives.

    Attributes:
        leaving: [sum(sent)], places in the rank's [B * t] tokens, by the rank they go to.
        sent, received: tokens that go to and come from each rank.
        arrivals: what comes, in the order of `received`.
    """

    leaving: Tensor
    sent: list[int]
    received: list[int]
    arrivals: list[Arrival]

    def places(self, t: int) -> tuple[Tensor, Tensor]:
        """Row and place in the row of what leaves, of rows of `t` tokens on this rank."""
        return self.leaving // t, self.leaving % t


# The tokens of a row that a rank needs: (layout, rank) -> ranges that do not overlap.
Needs = Callable[[RowLayout, int], Iterable[range]]


def plan_route(
    documents: SplitDocuments, needs: Needs, device: torch.device, *, own: bool = False
) -> Route:
    """How each rank gets the tokens it needs, with `own` also those that it holds.

    All ranks compute alike.
    """
    mine, ranks = documents.rank, len(documents.layouts[0].blocks)
    t = sum(map(len, documents.layouts[0].blocks[mine]))
    leaving: list[list[Tensor]] = [[] for _ in range(ranks)]
    coming: list[list[tuple[int, range]]] = [[] for _ in range(ranks)]
    for row, layout in enumerate(documents.layouts):
        for rank in range(ranks):
            for needed in needs(layout, rank):
                for tokens, owner, place in layout.holders(needed):
                    if owner == rank and not own:
                        continue
                    if owner == mine:
                        first = row * t + place
                        leaving[rank].append(torch.arange(first, first + len(tokens)))
                    if rank == mine:
                        coming[owner].append((row, tokens))

    arrivals, place = [], 0
    for from_rank in coming:
        for row, tokens in from_rank:
            arrivals.append(Arrival(row, tokens, place))
            place += len(tokens)
    to_ranks = [torch.cat(parts) if parts else torch.empty(0).long() for parts in leaving]
    return Route(
        torch.cat(to_ranks).to(device),
        [len(tokens) for tokens in to_ranks],
        [sum(len(tokens) for _, tokens in from_rank) for from_rank in coming],
        arrivals,
    )
