"""Compiled functions compute the same, and run uncompiled where no compiler works."""

import pytest
import torch
from torch import Tensor

from pretrain.model.kernels.compiled import compiled


def squares(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y).exp()


def cubes(x: Tensor, y: Tensor) -> Tensor:
    return (x * x * x + y).exp()


def test_any_size_after_one_compilation() -> None:
    fast = compiled(squares)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (7, 12, 100):
            x, y = torch.rand(2, n)
            torch.testing.assert_close(fast(x, y), squares(x, y))


def test_runs_uncompiled_where_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    fast = compiled(cubes)
    x, y = torch.rand(2, 9)
    with pytest.warns(UserWarning, match="cubes runs uncompiled"):
        torch.testing.assert_close(fast(x, y), cubes(x, y))
    torch.testing.assert_close(fast(y, x), cubes(y, x))


def test_errors_of_the_function_are_its_own() -> None:
    with pytest.raises(ValueError, match="too short"):
        compiled(refuse)(torch.rand(3))


@torch.compiler.disable
def refuse(x: Tensor) -> Tensor:
    raise ValueError("too short")
