"""Loops that numba compiles once for all processes."""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function on its first call, and keep the code where a folder can be written.

    What is kept goes by the date of the function's own file: the constants and the compiled
    functions that it uses stand in the same one.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder can be written: every process compiles
        return njit(nogil=True)(function)
