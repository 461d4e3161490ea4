"""Rows that are copies of tokens: made, and summed back, each the other's backward."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Copies(NamedTuple):
    """Which rows are copies of which of M tokens.

    Attributes:
        token: [S] int64, the token that each row is a copy of.
        rows: [M, k] int64, the rows of each token; S stands for none.
    """

    token: Tensor
    rows: Tensor


def repeat_rows(x: Tensor, copies: Copies) -> Tensor:
    """x [M, d] -> the rows [S, d]."""
    repeated: Tensor = _RepeatRows.apply(x, copies)
    return repeated


def sum_rows(rows: Tensor, copies: Copies) -> Tensor:
    """rows [S, d] -> [M, d], the sum of each token's rows, in fp32 or wider; zero without any."""
    summed: Tensor = _SumRows.apply(rows, copies)
    return summed


class _RepeatRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: Copies) -> Tensor:
        ctx.save_for_backward(*copies)
        return x.index_select(0, copies.token)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad[0], Copies(*ctx.saved_tensors)), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, copies: Copies) -> Tensor:
        ctx.save_for_backward(copies.token)
        return _sum(rows, copies)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        (token,) = ctx.saved_tensors
        return grad[0].index_select(0, token), None


def _sum(rows: Tensor, copies: Copies) -> Tensor:
    """The same bits every time: `index_add_` is sequential on a CPU, but atomic on a GPU."""
    if rows.device.type == "cpu":
        return add_to_tokens(rows, copies)
    return gather_by_token(rows, copies)


def add_to_tokens(rows: Tensor, copies: Copies) -> Tensor:
    """`sum_rows`, one row after the other."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    out = rows.new_zeros(len(copies.rows), rows.shape[1], dtype=dtype)
    return out.index_add_(0, copies.token, rows.to(dtype)).to(rows.dtype)


def gather_by_token(rows: Tensor, copies: Copies) -> Tensor:
    """`sum_rows`, all tokens at once."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    with_none = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return with_none[copies.rows].sum(1, dtype=dtype).to(rows.dtype)
