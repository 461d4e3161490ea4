"""Functions of tensors as torch.compile makes them: element-wise work in few kernels."""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def compiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function`, compiled when it is called: for the sizes it meets, then for any; where that
    fails, as it is.

    It fails where Triton or its C compiler is missing.
    """
    fast: Callable[Arguments, Result] = torch.compile(function)
    broken = False

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        nonlocal broken
        if not broken:
            try:
                return fast(*args, **kwargs)
            except Exception as error:
                if not _is_of_the_compiler(error):
                    raise
                broken = True
                warnings.warn(f"{function.__name__} runs uncompiled: {error}", stacklevel=2)
        return function(*args, **kwargs)

    return call


def _is_of_the_compiler(error: Exception) -> bool:
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    kinds: tuple[Any, ...] = (TorchDynamoException, InductorError)
    return isinstance(error, kinds)
