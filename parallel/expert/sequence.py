"""What a router must know of the rest of a sequence that ranks share."""

from typing import Any

from torch import Tensor

from parallel.comm import Communicator


class SplitRows:
    """Expert counts of rows of which each rank of a group holds a consecutive part."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm

    def sum(self, counts_be: Tensor) -> Tensor:
        """Of the part on this rank [B, E] -> of the whole rows."""
        return self._gather(counts_be).sum(0)

    def before(self, counts_be: Tensor) -> Tensor:
        """Of the part on this rank [B, E] -> of the parts before it."""
        return self._gather(counts_be)[: self.comm.rank].sum(0)

    def _gather(self, counts_be: Tensor) -> Tensor:
        return self.comm.start_all_gather(counts_be[None], 0).wait()


def split_rows(moe_layers: list[Any], comm: Communicator) -> None:
    """Tell the routers that the ranks of `comm` hold consecutive parts of the same rows."""
    rows = SplitRows(comm)
    for moe in moe_layers:
        moe.sum_over_sequence = rows.sum
        moe.slots_before = rows.before
