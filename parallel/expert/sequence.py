"""What a router must know of the rest of a row that ranks share."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from parallel.comm import Communicator
from parallel.context.documents import SplitDocuments
from parallel.layout import RowLayout
from pretrain.model.kernels.documents import Documents
from pretrain.model.kernels.slots import queue_positions


class SplitRows:
    """Expert counts of rows that are shared by ranks: by those of `cp` in blocks, and by those of
    `tp` in equal parts of what a rank of `cp` has.

    Args:
        tp, cp: None where there is one rank.
    """

    def __init__(self, tp: Communicator | None, cp: Communicator | None) -> None:
        # The rank along `tp` counts fastest.
        self.axes = [comm for comm in (tp, cp) if comm is not None]
        self.tp_ranks, self.tp_rank = (tp.size, tp.rank) if tp else (1, 0)

    def sum(self, counts_be: Tensor) -> Tensor:
        """Of the part on this rank [B, E] -> of the whole rows."""
        return self._gather(counts_be).sum(0)

    def queue(self, indices_btk: Tensor, n_experts: int, documents: Documents | None) -> Tensor:
        """How many earlier tokens of the whole row chose a slot's expert: [B, t, k] -> [B, t, k].

        A rank's tokens are runs that follow one another in the row. To what is ahead of a slot on
        this rank comes what is ahead of its run on others.
        """
        assert documents is not None
        layouts, rank = self._layouts(documents)
        runs_of_row = [
            torch.arange(len(layout.blocks[rank])).repeat_interleave(
                torch.tensor([len(block) for block in layout.blocks[rank]])
            )
            for layout in layouts
        ]
        run_bt = torch.stack(runs_of_row).to(indices_btk.device)
        n_runs = max(len(blocks) for layout in layouts for blocks in layout.blocks)

        slot = (run_bt[..., None] * n_experts + indices_btk).flatten(1)
        counts = slot.new_zeros(len(slot), n_runs * n_experts)
        counts.scatter_add_(1, slot, torch.ones_like(slot))
        counts_nbre = self._gather(counts.unflatten(1, (n_runs, n_experts)))

        start_bnr = torch.stack([_starts(layout, n_runs) for layout in layouts])
        is_ahead = start_bnr[:, None] < start_bnr[:, rank, :, None, None]
        is_ahead[:, :, rank] = False
        ahead_bre = torch.einsum(
            "bsnr,nbre->bse", is_ahead.to(slot.device).double(), counts_nbre.double()
        ).long()
        ahead_bte = ahead_bre.gather(1, run_bt[..., None].expand(-1, -1, n_experts))
        return ahead_bte.gather(2, indices_btk) + queue_positions(indices_btk, n_experts)

    def _layouts(self, documents: Documents) -> tuple[list[RowLayout], int]:
        """Of each row, over the ranks of both axes, and this rank's number among them."""
        if isinstance(documents, SplitDocuments):
            layouts = [layout.cut(self.tp_ranks) for layout in documents.layouts]
            return layouts, documents.rank * self.tp_ranks + self.tp_rank
        whole = (RowLayout(row, ((range(sum(row)),),)) for row in documents.lengths)
        return [layout.cut(self.tp_ranks) for layout in whole], self.tp_rank

    def _gather(self, counts: Tensor) -> Tensor:
        """[ranks, ...] of all ranks that share the rows."""
        counts = counts[None]
        for comm in self.axes:
            counts = comm.start_all_gather(counts, 0).wait()
        return counts


def split_rows(moe_layers: list[Any], tp: Communicator | None, cp: Communicator | None) -> None:
    """Tell the routers that the ranks of these axes share the rows."""
    rows = SplitRows(tp, cp)
    for moe in moe_layers:
        moe.sum_over_sequence = rows.sum
        moe.queue = rows.queue


def _starts(layout: RowLayout, n_runs: int) -> Tensor:
    """[ranks, n_runs], where each run starts; past the row's end where a rank has fewer."""
    starts = [torch.tensor([block.start for block in blocks]) for blocks in layout.blocks]
    starts.append(torch.zeros(n_runs, dtype=torch.int64))
    end = sum(layout.lengths)
    return pad_sequence(starts, batch_first=True, padding_value=end)[:-1]
