"""A rank's part of rows that the ranks of `cp` share, whole or in segments."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.context.documents import SplitDocuments
from parallel.layout import split_row
from parallel.segments.documents import cut_apart, cut_rows, tokens_of
from parallel.segments.lanes import LaneMemory
from parallel.segments.memory import SegmentMemory
from pretrain.config import Config
from pretrain.model.kernels.documents import Documents
from pretrain.parts import attention_cost


@dataclass(frozen=True)
class RankShare:
    """What a rank of `cp` has of a microbatch.

    Attributes:
        documents: with `context.segments`, or lanes, a list of those of each segment.
        tokens: [B, T / cp], which tokens of each row it has, in its order; None if all in theirs.
    """

    documents: Any
    tokens: Tensor | None

    @property
    def position(self) -> Tensor:
        """[B, T / cp], how many tokens of their documents come before these, on the host."""
        if isinstance(self.documents, list):
            return torch.cat([segment.position for segment in self.documents], dim=1)
        position: Tensor = self.documents.position
        return position

    def documents_on(self, device: torch.device) -> Any:
        """The documents on a device; the host does not wait."""
        if isinstance(self.documents, list):
            return [segment.to(device) for segment in self.documents]
        return self.documents.to(device)


def share_of_rank(
    config: Config,
    documents: Documents,
    rank: int,
    lanes: LaneMemory | None = None,
    of_lanes: slice | None = None,
) -> RankShare:
    """What rank number `rank` of `cp` has of a microbatch of such documents.

    Args:
        lanes: what rows go on with; None lets them all begin anew.
        of_lanes: which of them are the microbatch's; None is all.
    """
    ranks, context = config.parallel.cp, config.context
    cost, rows = attention_cost(config.model), documents.lengths
    if context.in_segments:
        if not context.carry:
            size = documents.position.shape[1] // context.segments
            rows = tuple(tuple(cut_apart(row, size)) for row in rows)
        memory = SegmentMemory(context.segments, context.reach, lanes, of_lanes)
        segments = cut_rows(rows, context.segments, memory, rank, ranks, cost)
        return RankShare(segments, tokens_of(segments))
    if ranks == 1:
        return RankShare(documents, None)
    layouts = [split_row(row, ranks, cost) for row in rows]
    mine = [torch.from_numpy(layout.tokens_of(rank)) for layout in layouts]
    return RankShare(SplitDocuments.of_rank(layouts, rank), torch.stack(mine))
