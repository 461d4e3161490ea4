from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pretrain.model.kernels.rows import (
    Copies,
    add_to_tokens,
    gather_by_token,
    repeat_rows,
    sum_rows,
)
from pretrain.model.kernels.slots import sort_by_expert


@pytest.fixture
def copies() -> Copies:
    """Of 9 tokens, some with 3 rows, some with none."""
    indices = torch.randint(-1, 4, (9, 3), generator=torch.Generator().manual_seed(0))
    return sort_by_expert(indices, 4, int((indices >= 0).sum())).copies


def selection(copies: Copies) -> Tensor:
    """[S, M], what repeats rows when it is multiplied with tokens."""
    return torch.nn.functional.one_hot(copies.token, len(copies.rows)).double()


@pytest.mark.parametrize("add", [add_to_tokens, gather_by_token])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_are_summed_by_token(
    copies: Copies, add: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    rows = torch.randn(len(copies.token), 5).to(dtype)
    # bf16 is rounded once, after the sum.
    torch.testing.assert_close(
        add(rows, copies), (selection(copies).T @ rows.double()).to(dtype), rtol=1e-2, atol=1e-12
    )


def test_repeating_and_summing_are_each_others_backward(copies: Copies) -> None:
    x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(len(copies.token), 5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(repeat_rows(x, copies), x[copies.token])
    assert torch.autograd.gradcheck(lambda x: repeat_rows(x, copies), x)
    assert torch.autograd.gradcheck(lambda rows: sum_rows(rows, copies), rows)
