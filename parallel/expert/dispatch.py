"""Expert parallelism: tokens travel to the ranks that hold their experts, and back."""

from typing import Any

import torch
from torch import Tensor, nn

from parallel.comm import Communicator
from pretrain.model.kernels.experts import combine_by_token, permute_rows, sort_by_expert


class AllToAllDispatch:
    """Takes the place of `moe.dispatch` where the experts are spread over a group.

    Rank r of the group holds the experts [r * E / n, (r + 1) * E / n). No token is dropped, and
    the order in which results are added depends on routing alone.
    """

    def __init__(self, comm: Communicator, n_experts: int) -> None:
        self.comm = comm
        self.n_experts = n_experts

    def __call__(
        self, x: Tensor, expert_indices: Tensor, expert_weights: Tensor, experts: nn.Module
    ) -> Tensor:
        """x [N, d], expert_indices and expert_weights [N, k] -> [N, d]."""
        rows, slots = sort_by_expert(x, expert_indices, self.n_experts)
        counts_by_source = self._exchange_counts(slots.counts)
        sent = slots.counts.view(self.comm.size, -1).sum(1).tolist()
        received = counts_by_source.sum(1).tolist()
        arrived = self.comm.all_to_all(rows, received, sent)

        by_expert = self._source_major_to_expert_major(counts_by_source)
        by_source = by_expert.argsort()
        computed = experts(permute_rows(arrived, by_expert, by_source), counts_by_source.sum(0))
        returned = self.comm.all_to_all(
            permute_rows(computed, by_source, by_expert), sent, received
        )
        return combine_by_token(returned, expert_weights, slots)

    def _exchange_counts(self, counts: Tensor) -> Tensor:
        """How many rows each source rank has for each local expert: [ranks, E / ranks]."""
        one_each = [1] * self.comm.size
        return self.comm.exchange(counts.view(self.comm.size, -1), one_each, one_each)

    @staticmethod
    def _source_major_to_expert_major(counts_by_source: Tensor) -> Tensor:
        """The permutation that groups rows, sorted by (source, expert), by expert."""
        local_experts = torch.arange(counts_by_source.shape[1], device=counts_by_source.device)
        expert_of_row = local_experts.repeat(counts_by_source.shape[0]).repeat_interleave(
            counts_by_source.flatten()
        )
        return expert_of_row.argsort(stable=True)


def on_local_experts(compute: Any) -> Any:
    """Wrap `experts.compute` so that it sees this rank's experts of DTensor weights."""

    def compute_locally(x: Tensor, counts: Tensor, *weights: Any) -> Tensor:
        result: Tensor = compute(x, counts, *(weight.to_local() for weight in weights))
        return result

    return compute_locally
