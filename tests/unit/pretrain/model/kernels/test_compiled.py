"""Compiled functions compute the same, and run uncompiled where no compiler works."""

import pytest
import torch
import torch._inductor.config
from torch import Tensor

from pretrain.model.kernels.compiled import compiled


def squares(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y).exp()


def cubes(x: Tensor, y: Tensor) -> Tensor:
    return (x * x * x + y).exp()


def test_any_size_after_two_compilations() -> None:
    fast = compiled(squares)
    for n in (7, 12, 100, 1000):
        x, y = torch.rand(2, n)
        with torch._dynamo.config.patch(error_on_recompile=n > 12):
            torch.testing.assert_close(fast(x, y), squares(x, y))


def test_runs_uncompiled_where_there_is_no_compiler() -> None:
    fast = compiled(cubes)
    x, y = torch.rand(2, 9)
    with (
        torch._inductor.config.patch(
            {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
        ),
        pytest.warns(UserWarning, match="cubes runs uncompiled"),
    ):
        torch.testing.assert_close(fast(x, y), cubes(x, y))
    torch.testing.assert_close(fast(y, x), cubes(y, x))


def test_errors_of_the_function_are_its_own() -> None:
    with pytest.raises(ValueError, match="too short"):
        compiled(refuse)(torch.rand(3))


@torch.compiler.disable
def refuse(x: Tensor) -> Tensor:
    raise ValueError("too short")
