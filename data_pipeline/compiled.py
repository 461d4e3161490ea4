"""Loops that numba compiles once for all processes."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba

config: Any = numba.config


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function on its first call, and keep the code where a folder can be written.

    numba takes what it has kept until the file of the function changes. Functions here also hold
    constants and functions of files beside theirs: each state of a folder has a cache of its own.
    """
    return _compiled(function)


def compiled_in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled` for a function that makes no array, and calls none that does.

    References to arrays are not counted then, which takes most of the time of a short function.
    """
    return _compiled(function, _nrt=False)


def _compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    folder = Path(function.__code__.co_filename).parent
    configured = config.CACHE_DIR
    config.CACHE_DIR = str(cache_folder(folder) / f"compiled-{_digest_of_sources(folder)}")
    try:
        return numba.njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # no folder can be written: every process compiles
        return numba.njit(nogil=True, **options)(function)
    finally:
        config.CACHE_DIR = configured


def cache_folder(folder: Path) -> Path:
    """Where what is made once for the code in a folder is kept."""
    return Path(config.CACHE_DIR or folder / "__pycache__")


@cache
def _digest_of_sources(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
