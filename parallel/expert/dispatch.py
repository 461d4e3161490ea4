"""Expert parallelism: tokens travel to the ranks that hold their experts, and back."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel.comm import Communicator
from parallel.overlap import begin
from pretrain.model.kernels.rows import Copies, repeat_rows, sum_rows
from pretrain.model.kernels.slots import sort_by_expert


class Route(NamedTuple):
    """How the tokens [N, d] of a rank travel.

    Attributes:
        copies: the rows that leave, sorted by rank and then by token: a token goes once to each
            rank that holds experts of its choice.
        expert_indices: [rows that leave, k], in the numbering of the rank they go to, -1 for the
            choices of other ranks.
        sent: rows that go to each rank.
        received: rows that come from each rank.
        received_slots: choices that come with them.
    """

    copies: Copies
    expert_indices: Tensor
    sent: list[int]
    received: list[int]
    received_slots: int


class AllToAllDispatch:
    """Takes the place of `moe.dispatch` where the experts are spread over a group.

    Rank r of the group holds the experts [r * E / n, (r + 1) * E / n). A rank sums what its experts
    make of a token, and the token's rank adds up these sums in the order of the ranks: the order
    of additions depends on routing alone.
    """

    def __init__(self, comm: Communicator, n_experts: int) -> None:
        self.comm = comm
        self.experts_per_rank = n_experts // comm.size

    def __call__(
        self, x: Tensor, expert_indices: Tensor, expert_weights: Tensor, experts: Any
    ) -> Callable[[], Tensor]:
        """x [N, d], expert_indices and expert_weights [N, k] -> [N, d], when called again."""
        route = self.route(expert_indices)
        choices = torch.cat(
            [
                repeat_rows(expert_weights, route.copies),
                route.expert_indices.to(expert_weights.dtype),
            ],
            dim=1,
        )
        rows = repeat_rows(x, route.copies)
        there = partial(self.comm.start_exchange, received=route.received, sent=route.sent)
        back = partial(self.comm.start_exchange, received=route.sent, sent=route.received)
        arriving = [begin(leaving, there, back) for leaving in (rows, choices)]

        def finish() -> Tensor:
            rows, choices = (arrive() for arrive in arriving)
            weights, indices = choices.chunk(2, dim=1)
            slots = sort_by_expert(
                indices.detach().long(), self.experts_per_rank, route.received_slots
            )
            computed = experts(rows, weights, slots)
            returned = self.comm.all_to_all(computed, route.sent, route.received)
            return sum_rows(returned, route.copies)

        return finish

    def route(self, expert_indices: Tensor) -> Route:
        """Where the choices [N, k] lead, and what comes here. The host waits once, for counts."""
        rank_of_choice = expert_indices.div(self.experts_per_rank, rounding_mode="floor")
        ranks = torch.arange(self.comm.size, device=expert_indices.device)
        chosen_rnk = rank_of_choice == ranks[:, None, None]
        goes_rn = chosen_rnk.any(-1)
        leaving = torch.stack([goes_rn.sum(1), chosen_rnk.sum((1, 2))], dim=1)
        one_each = [1] * self.comm.size
        coming = self.comm.exchange(leaving, one_each, one_each)
        sent, received, received_slots = self.counts_on_host(leaving, coming)

        n_rows = sum(sent)
        rank, token = goes_rn.nonzero_static(size=n_rows).unbind(1)
        row_rn = torch.full_like(goes_rn, n_rows, dtype=torch.int64)
        row_rn[rank, token] = torch.arange(n_rows, device=token.device)
        # A token's ranks in ascending order, each once.
        ranks_nk = rank_of_choice.sort(dim=1).values
        is_new = ranks_nk.diff(dim=1, prepend=torch.full_like(ranks_nk[:, :1], -1)) > 0
        rows_nk = torch.where(is_new, row_rn.mT.gather(1, ranks_nk.clamp_min(0)), n_rows)

        local = expert_indices[token] - rank[:, None] * self.experts_per_rank
        is_local = (local >= 0) & (local < self.experts_per_rank)
        return Route(
            Copies(token, rows_nk),
            torch.where(is_local, local, -1),
            sent,
            received,
            sum(received_slots),
        )

    def counts_on_host(
        self, leaving: Tensor, coming: Tensor
    ) -> tuple[list[int], list[int], list[int]]:
        """Rows that go to each rank, rows that come from it, and choices that come with them.

        Args:
            leaving, coming: [ranks, 2], rows and choices.
        """
        (sent, _), (received, received_slots) = torch.stack([leaving, coming]).mT.tolist()
        return sent, received, received_slots


def on_local_experts(compute: Any) -> Any:
    """Wrap `experts.compute` so that it sees this rank's experts of DTensor weights."""

    def compute_locally(x: Tensor, expert_weights: Tensor, slots: Any, *weights: Any) -> Tensor:
        local = (weight.to_local() for weight in weights)
        result: Tensor = compute(x, expert_weights, slots, *local)
        return result

    return compute_locally
