"""Experts that no token chooses are found, but not too early."""

import torch

from pretrain.metrics.expert_load import DeadExperts


def test_an_expert_is_dead_that_no_token_chose_in_a_whole_window() -> None:
    dead = DeadExperts(window=3)
    counts = torch.tensor([[0, 2, 1], [1, 0, 0]])
    elsewhere = torch.tensor([[1, 0, 1], [1, 0, 1]])
    assert dead.add(counts) is None
    assert dead.add(elsewhere) is None
    assert dead.add(counts) == [(1, 1)]
    # A new window knows nothing of the one before.
    assert dead.add(counts) is None
    assert dead.add(counts) is None
    assert dead.add(counts) == [(0, 0), (1, 1), (1, 2)]
