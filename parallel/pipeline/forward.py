"""A pipeline's stages forward only, for evaluation: microbatches one after the other."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def run_forward(
    stages: Mapping[int, Any],
    owners: Sequence[int],
    group: dist.ProcessGroup,
    tokens: Tensor,
    labels: Tensor,
    hidden: Tensor,
) -> None:
    """Run one microbatch through all stages. Nothing is kept of it. Collective over `group`.

    A rank waits only for what its own stages need, so that those of several microbatches overlap
    where each rank has one stage.

    Args:
        stages: those of this rank, by their number, called as `Stage` is.
        owners: of each stage the rank in `group`.
        tokens, labels: [b, T]
        hidden: [b, T_local, d], as one that stages pass on; only its shape, type and device matter.
    """
    rank = dist.get_rank(group)
    x = tokens
    for number, owner in enumerate(owners):
        before = owners[number - 1] if number else owner
        if owner == rank:
            if before != rank:
                x = torch.empty_like(hidden)
                dist.recv(x, group=group, group_src=before)
            x = stages[number](x, labels)
        elif before == rank:
            dist.send(x.contiguous(), group=group, group_dst=owner)
