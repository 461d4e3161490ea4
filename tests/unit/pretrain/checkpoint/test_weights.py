"""Weights that are out of range are refused, and named."""

import math

import pytest
import torch
from torch import nn

from pretrain.checkpoint.weights import check_weights
from pretrain.errors import TrainingError


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def test_ordinary_weights_pass_at_any_sign() -> None:
    check_weights(model().named_parameters(), 1.0)


@pytest.mark.parametrize(
    ("value", "what"),
    [(math.nan, "not finite"), (-math.inf, "not finite"), (-7.5, "as large as 7.5")],
)
def test_the_worst_weight_is_named(value: float, what: str) -> None:
    weights = model()
    with torch.no_grad():
        weights[1].bias[0] = value
        weights[0].weight[1, 2] = 5.5
    with pytest.raises(TrainingError, match=rf"1\.bias are {what} \(guard.max_weight = 5\)"):
        check_weights(weights.named_parameters(), 5.0)


def test_the_limit_itself_passes() -> None:
    weights = model()
    with torch.no_grad():
        weights[0].weight[0, 0] = 5.0
    check_weights(weights.named_parameters(), 5.0)
