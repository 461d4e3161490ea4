import math

import numpy as np
import torch

from pretrain.evals.by_position import by_powers_of_two
from pretrain.model.kernels.cross_entropy import IGNORED
from pretrain.token_losses import LossGroups, TokenLosses


def test_positions_have_the_buckets_of_the_evaluation() -> None:
    length = 100
    position = torch.arange(length)
    losses = torch.rand(length, generator=torch.Generator().manual_seed(0))
    groups = LossGroups(1, length)
    sums = groups.add_up(
        losses, torch.zeros(length), groups.of_tokens(torch.zeros(length), position)
    )
    _, by_position = groups.split(sums)
    expected = by_powers_of_two(position.numpy() + 1, losses.double().numpy())
    assert [1 << n for n in range(len(by_position))] == [bucket.first for bucket in expected]
    assert [part.tokens for part in by_position] == [bucket.tokens for bucket in expected]
    np.testing.assert_allclose(
        [part.loss for part in by_position], [bucket.loss for bucket in expected], rtol=1e-14
    )


def test_an_infinite_loss_is_told_of_where_it_is() -> None:
    groups = LossGroups(3, 4)
    losses, labels = torch.tensor([1.0, math.inf, 3.0, 0.0]), torch.tensor([1, 1, 1, IGNORED])
    of_tokens = groups.of_tokens(torch.tensor([0, 1, 0, 2]), torch.tensor([0, 0, 1, 3]))
    by_source, by_position = groups.split(groups.add_up(losses, labels, of_tokens))
    assert by_source[:2] == [(2.0, 2), (math.inf, 1)]
    assert math.isnan(by_source[2].loss)
    assert by_source[2].tokens == 0
    assert by_position[:2] == [(math.inf, 2), (3.0, 1)]


def test_losses_are_kept_where_a_gradient_is_taken() -> None:
    cross_entropy = TokenLosses(chunk=2)
    hidden, weight = torch.randn(2, 3, 4), torch.randn(5, 4, requires_grad=True)
    labels = torch.tensor([[0, 1, IGNORED], [2, 3, 4]])
    with torch.no_grad():
        cross_entropy(hidden, weight, labels)
    assert not cross_entropy.seen
    total = cross_entropy(hidden, weight, labels)
    (losses,) = cross_entropy.seen
    expected = torch.nn.functional.cross_entropy(
        (hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="none"
    )
    torch.testing.assert_close(losses, expected.view(2, 3))
    torch.testing.assert_close(total, losses.sum())
